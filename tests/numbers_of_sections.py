"""The numbers of an analysis, by their place in its JSON."""


def leaves(value, path="") -> dict[str, float]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, x in items for k, v in leaves(x, f"{path}/{key}").items()}
    return {path: value} if isinstance(value, int | float) else {}
