"""What commands share: arguments, silence of the libraries, and who speaks."""

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

OVERRIDES_HELP = "key.path=value pairs, set over the file; values are YAML: train.seed=2 model.tower.hidden=[64,32]"
ALLOW_HELP = "A package whose code may run for a kind 'package.module:Class'; installed, or on PYTHONPATH; repeat it."
RUN_HELP = "A run directory: what train.run_dir named."

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A run file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES_HELP, show_default=False)]
RunDir = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP, show_default=False)]
Allow = Annotated[list[str] | None, typer.Option("--allow", metavar="PACKAGE", help=ALLOW_HELP)]
DEVICE_HELP = "auto (cuda where there is one), cpu or cuda. Default: the run's train.device."
Device = Annotated[str | None, typer.Option("--device", help=DEVICE_HELP, show_default=False)]
CheckpointName = Annotated[str, typer.Option("--checkpoint", help="best, latest, or a step.")]


def group(text: str, **options: Any) -> typer.Typer:
    """An empty group of commands; plain help, no tracebacks of the library."""
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None, **options)


def reads_parts(command: Callable[..., None]) -> Callable[..., None]:
    """A command that reads a run or a run file, whose kinds may name code from elsewhere: it takes --allow too."""

    @wraps(command)
    def with_allow(*args: Any, allow: list[str] | None = None, **options: Any) -> None:
        from hmoe_rec import kinds

        kinds.allow(allow or ())
        command(*args, **options)

    # Typer reads both.
    signature = inspect.signature(command)
    option = inspect.Parameter("allow", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Allow)
    given: Any = with_allow
    given.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    given.__annotations__ = {**command.__annotations__, "allow": Allow}
    return with_allow


def is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def quiet() -> None:
    """Silences what TorchRec, torch.fx and FBGEMM say about themselves; their errors stay."""
    import logging
    import warnings

    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (r".*`torch\.distributed\..*` is deprecated", r"`broadcast_buffers` is deprecated"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=pattern)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\..*")
    warnings.filterwarnings("ignore", message=r".*autograd kernel was not registered.*")
