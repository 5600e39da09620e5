"""A seed and effect sizes -> the users, items and effects of the synthetic log, exposures of them, and true logits.

The formulas stand in `hmoe_rec.data.synthetic`, which writes the files. Letters of shapes: B exposures of a block,
T tasks, P positions of the history, C categories, R latent dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hmoe_rec.suggest import unknown
from hmoe_rec.types import ConfigError

TASKS = ("click", "like", "buy")

# What one unit of each effect moves the true logit.
EFFECTS: dict[str, dict[str, float]] = {
    "click": {"affinity": 1.0, "user": 0.3, "item": 0.4, "price": 0.6, "history": 1.8, "slot": 0.4},
    "like": {"affinity": 1.0, "user": 0.3, "item": 0.5, "price": -0.5, "history": -1.4, "slot": 0.0},
    "buy": {"affinity": 0.7, "user": 0.3, "item": 0.3, "price": -0.8, "history": 1.6, "slot": 0.0},
}

NUM_CITIES, NUM_AGE_BUCKETS, NUM_GENDERS, NUM_SLOTS, NUM_TAGS, MAX_TAGS = 60, 7, 2, 4, 30, 4
ITEMS_PER_AUTHOR = 5
FAVORITES = 4  # categories that a user prefers
PRICE_LEVELS, PRICE_STEP = 1024, 100
RELATED_SHARE = 0.4  # effect of a behavior in the related category, against one in the target's own
PROFILE_SHARE = 0.5  # variance of a preference that age bucket and gender, or category and tags, explain
SLOT_VALUES = (1.0, 0.3, -0.3, -1.0)
TYPICAL_GAP_SECONDS = 7200.0
DAY_SECONDS = 86400
START_SECONDS = 1_704_067_200  # 2024-01-01 00:00 UTC
SPLITS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}  # first day, day after the last

# Streams of random numbers below the seed, so that the world, the intercepts and every block have one of their own.
_WORLD, _INTERCEPTS, _BLOCKS = range(3)
_PILOT_ROWS = 32768


@dataclass(frozen=True)
class SyntheticArguments:
    """All that decides the contents of a synthetic log; `synthesize` documents each.

    Raises:
        ConfigError: a value that is out of its range.
    """

    rows: int = 400_000
    validation_rows: int = 50_000
    test_rows: int = 50_000
    seed: int = 1
    num_users: int = 2000
    num_items: int = 1000
    num_categories: int = 20
    max_history: int = 20
    latent_dim: int = 2
    vector_dim: int = 8
    vector_noise: float = 0.5
    skew: float = 0.5
    click_rate: float = 0.35
    like_rate: float = 0.2
    buy_rate: float = 0.3
    conflict: float = -0.6
    history_clock: Literal["position", "age"] = "position"
    fastest_decay: float = 1.0
    slowest_decay: float = 6.0
    missing: float = 0.05
    unseen_price_share: float = 0.0
    effects: Mapping[str, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "validation_rows", "test_rows", "num_users", "max_history", "latent_dim"):
            self._expect(name, getattr(self, name) >= 1, ">= 1")
        self._expect("num_categories", self.num_categories >= 2, ">= 2")
        self._expect("seed", self.seed >= 0, ">= 0")
        self._expect("num_items", self.num_items >= self.num_categories, f">= num_categories ({self.num_categories})")
        self._expect("vector_dim", self.vector_dim >= self.latent_dim, f">= latent_dim ({self.latent_dim})")
        self._expect("vector_noise", self.vector_noise >= 0, ">= 0")
        self._expect("conflict", -1 <= self.conflict <= 1, "in [-1, 1]")
        for name in ("click_rate", "like_rate", "buy_rate"):
            self._expect(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        for name in ("skew", "missing", "unseen_price_share"):
            self._expect(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._expect("history_clock", self.history_clock in ("position", "age"), "'position' or 'age'")
        self._expect("fastest_decay", self.fastest_decay > 0, "> 0")
        at_least = f">= fastest_decay ({self.fastest_decay})"
        self._expect("slowest_decay", self.slowest_decay >= self.fastest_decay, at_least)
        for task, sizes in (self.effects or {}).items():
            if task not in EFFECTS:
                raise ConfigError(f"effects: {unknown('task', task, EFFECTS)}")
            for name in sizes:
                if name not in EFFECTS[task]:
                    raise ConfigError(f"effects.{task}: {unknown('effect', name, EFFECTS[task])}")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} of the synthetic log must be {expected}, got {getattr(self, name)!r}")

    def split_rows(self, split: str) -> int:
        return {"train": self.rows, "validation": self.validation_rows, "test": self.test_rows}[split]

    def effect(self, task: str, name: str) -> float:
        return float((self.effects or {}).get(task, {}).get(name, EFFECTS[task][name]))

    @property
    def rates(self) -> tuple[float, float, float]:
        return self.click_rate, self.like_rate, self.buy_rate

    @property
    def num_authors(self) -> int:
        return -(-self.num_items // ITEMS_PER_AUTHOR)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with every effect spelled out: two logs are equal if these are."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"effects": {task: {name: self.effect(task, name) for name in EFFECTS[task]} for task in TASKS}}


@dataclass(frozen=True)
class World:
    """Everything that is drawn once. Preferences, qualities and biases have mean 0 and variance 1.

    Attributes:
        user_order: [num_users] user ids, the most active first; item_order: [num_items] item ids grouped by category,
            the most popular of a category first; category_start: [C + 1] where a category's items begin.
        favorites: [num_users, FAVORITES] categories.
        preferences: [T, num_users, R] of users; item_latent: [num_items, R].
        item_quality: [T, num_items]; user_bias: [num_users].
        related: [C] the related category of each; decay: [C] how slowly a category's history fades.
        price_values: [PRICE_LEVELS] the price that training shows for each drawn price.
    """

    arguments: SyntheticArguments
    user_order: np.ndarray
    favorites: np.ndarray
    age_bucket: np.ndarray
    gender: np.ndarray
    city: np.ndarray
    user_bias: np.ndarray
    preferences: np.ndarray
    user_vectors: np.ndarray
    item_order: np.ndarray
    category_start: np.ndarray
    category: np.ndarray
    author: np.ndarray
    tag_counts: np.ndarray
    tags: np.ndarray
    published_seconds: np.ndarray
    item_latent: np.ndarray
    item_quality: np.ndarray
    item_vectors: np.ndarray
    related: np.ndarray
    decay: np.ndarray
    price_values: np.ndarray


@dataclass(frozen=True)
class Exposures:
    """B exposures before anybody acts on them.

    Attributes:
        history_items, ages_seconds: [B, P], the latest behavior first; only the first `lengths[b]` of a row exist.
        price: [B] integers, -1 = missing; city_known, age_known: [B] whether the log has that value.
    """

    time_seconds: np.ndarray
    users: np.ndarray
    items: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    history_items: np.ndarray
    ages_seconds: np.ndarray
    price: np.ndarray
    weights: np.ndarray
    city_known: np.ndarray
    age_known: np.ndarray


def block_generator(seed: int, split: str, block: int) -> np.random.Generator:
    """The random numbers of one block of rows, whatever was drawn before."""
    return np.random.default_rng([seed, _BLOCKS, list(SPLITS).index(split), block])


def build_world(arguments: SyntheticArguments) -> World:
    """Draws users and items."""
    a, rng = arguments, np.random.default_rng([arguments.seed, _WORLD])
    basis = np.linalg.qr(rng.standard_normal((a.vector_dim, a.latent_dim)))[0]  # the same for users and items
    parts = _draw_users(a, rng, basis) | _draw_items(a, rng, basis)
    parts["related"] = (np.arange(a.num_categories) + a.num_categories // 2) % a.num_categories
    parts["decay"] = rng.permutation(np.geomspace(a.fastest_decay, a.slowest_decay, a.num_categories))
    values = np.arange(PRICE_LEVELS)
    shown = rng.random(PRICE_LEVELS) >= a.unseen_price_share
    shown[0] = True
    parts["price_values"] = np.maximum.accumulate(np.where(shown, values, 0))  # the next lower price that is shown
    return World(a, **parts)


def _draw_users(a: SyntheticArguments, rng: np.random.Generator, basis: np.ndarray) -> dict[str, np.ndarray]:
    age, gender = rng.integers(NUM_AGE_BUCKETS, size=a.num_users), rng.integers(NUM_GENDERS, size=a.num_users)
    city = _skewed(rng.random(a.num_users), NUM_CITIES, a.skew)
    profile = rng.standard_normal((NUM_AGE_BUCKETS, NUM_GENDERS, a.latent_dim))[age, gender]
    click = _blend(profile, rng.standard_normal((a.num_users, a.latent_dim)), PROFILE_SHARE)
    like = a.conflict * click + np.sqrt(1 - a.conflict**2) * rng.standard_normal(click.shape)
    buy = (click + rng.standard_normal(click.shape)) / np.sqrt(2)
    bias = _blend(rng.standard_normal(NUM_CITIES)[city], rng.standard_normal(a.num_users), PROFILE_SHARE)
    noise = a.vector_noise * rng.standard_normal((a.num_users, a.vector_dim))
    return {
        "user_order": rng.permutation(a.num_users),
        "favorites": _skewed(rng.random((a.num_users, FAVORITES)), a.num_categories, a.skew / 2),
        "age_bucket": age,
        "gender": gender,
        "city": city,
        "user_bias": bias,
        "preferences": np.stack([click, like, buy]),
        "user_vectors": (np.einsum("ur,vr->uv", click, basis) + noise).astype(np.float32),
    }


def _draw_items(a: SyntheticArguments, rng: np.random.Generator, basis: np.ndarray) -> dict[str, np.ndarray]:
    category = _skewed(rng.random(a.num_items), a.num_categories, a.skew / 2)
    category[: a.num_categories] = np.arange(a.num_categories)  # none is empty
    order = rng.permutation(a.num_items)
    order = order[np.argsort(category[order], kind="stable")]
    author = _skewed(rng.random(a.num_items), a.num_authors, a.skew)
    tag_counts = rng.integers(MAX_TAGS + 1, size=a.num_items)
    tags = np.argsort(rng.random((a.num_items, NUM_TAGS)), axis=1)[:, :MAX_TAGS]  # distinct
    tag_latent = rng.standard_normal((NUM_TAGS, a.latent_dim))[tags]
    content = rng.standard_normal((a.num_categories, a.latent_dim))[category]
    content = content + (tag_latent * (np.arange(MAX_TAGS) < tag_counts[:, None])[..., None]).sum(1)
    content /= np.sqrt(1 + tag_counts)[:, None]
    latent = _blend(content, rng.standard_normal(content.shape), PROFILE_SHARE)
    own = _blend(rng.standard_normal((a.num_authors, 2))[author], rng.standard_normal((a.num_items, 2)), PROFILE_SHARE)
    quality = np.stack([own[:, 0], a.conflict * own[:, 0] + np.sqrt(1 - a.conflict**2) * own[:, 1], own[:, 0]])
    noise = a.vector_noise * rng.standard_normal((a.num_items, a.vector_dim))
    return {
        "item_order": order,
        "category_start": np.searchsorted(category[order], np.arange(a.num_categories + 1)),
        "category": category,
        "author": author,
        "tag_counts": tag_counts,
        "tags": tags,
        "published_seconds": START_SECONDS - rng.integers(1, 365 * DAY_SECONDS, size=a.num_items),
        "item_latent": latent,
        "item_quality": quality,
        "item_vectors": (np.einsum("ir,vr->iv", latent, basis) + noise).astype(np.float32),
    }


def draw_exposures(world: World, rng: np.random.Generator, time_seconds: np.ndarray, *, training: bool) -> Exposures:
    """One exposure for each time; prices that are held out do not occur in training."""
    a, B, P = world.arguments, len(time_seconds), world.arguments.max_history
    users = world.user_order[_skewed(rng.random(B), a.num_users, a.skew)]
    categories = _draw_categories(world, rng, users, 1 + P)
    items = _draw_items_of(world, rng, categories)
    # One history in twenty is empty, half of the others are full, the rest are of any length.
    kind = rng.random(B)
    lengths = np.where(kind < 0.5, P, rng.integers(1, P + 1, size=B))
    lengths[kind >= 0.95] = 0
    gaps = np.exp(rng.standard_normal((B, P), dtype=np.float32)) * np.float32(TYPICAL_GAP_SECONDS)
    price = np.exp(4.5 + rng.standard_normal(B)).astype(np.int64).clip(0, PRICE_LEVELS - 1)
    price = world.price_values[price] if training else price
    price[rng.random(B) < a.missing] = -1
    return Exposures(
        time_seconds=time_seconds,
        users=users,
        items=items[:, 0],
        slots=rng.integers(NUM_SLOTS, size=B),
        lengths=lengths,
        history_items=items[:, 1:],
        ages_seconds=np.cumsum(gaps, axis=1).astype(np.int64),
        price=price,
        weights=rng.integers(1, 4, size=B) / 2,
        city_known=rng.random(B) >= a.missing,
        age_known=rng.random(B) >= a.missing,
    )


def _draw_categories(world: World, rng: np.random.Generator, users: np.ndarray, count: int) -> np.ndarray:
    """[B, count]: with even odds one of the user's favorites or any category by its popularity."""
    uniform = 2 * rng.random((len(users), count), dtype=np.float32)  # below 1 a favorite, from 1 on any
    favorite = world.favorites[users[:, None], (uniform * FAVORITES).astype(np.int64) % FAVORITES]
    popular = _skewed(uniform % 1, world.arguments.num_categories, world.arguments.skew / 2)
    return np.where(uniform < 1, favorite, popular)


def _draw_items_of(world: World, rng: np.random.Generator, categories: np.ndarray) -> np.ndarray:
    """An item of each category, by popularity within it."""
    start, end = world.category_start[categories], world.category_start[categories + 1]
    rank = _skewed(rng.random(categories.shape, dtype=np.float32), end - start, world.arguments.skew)
    return world.item_order[start + rank]


def _skewed(uniform: np.ndarray, size: int | np.ndarray, skew: float) -> np.ndarray:
    """Uniform numbers in [0, 1) -> ranks in [0, size) with P(rank k) about proportional to (k + 1)^-skew."""
    return np.minimum((size * uniform ** (1 / (1 - skew))).astype(np.int64), np.asarray(size) - 1)


def _blend(shared: np.ndarray, own: np.ndarray, share: float) -> np.ndarray:
    return np.sqrt(share) * shared + np.sqrt(1 - share) * own


def price_effect(price: np.ndarray) -> np.ndarray:
    """Smooth, neither rising nor falling throughout, and with a step; 0 where the price is missing (< 0)."""
    level = np.log1p(np.maximum(price, 0)) / np.log(PRICE_LEVELS)
    return np.where(price < 0, 0.0, np.sin(3 * np.pi * level) + 1.0 * (price >= PRICE_STEP))


def history_effect(world: World, e: Exposures, *, in_order: bool = True) -> np.ndarray:
    """[B], sum over behaviors of decay x kinship; with `in_order` false each behavior has its history's mean decay."""
    target = world.category[e.items][:, None]
    categories = world.category[e.history_items]
    exists = np.arange(world.arguments.max_history) < e.lengths[:, None]
    kinship = (categories == target) + RELATED_SHARE * (categories == world.related[target])
    fading = history_decay(world, target, e.ages_seconds) * exists
    if not in_order:
        fading = exists * (fading.sum(1) / np.maximum(e.lengths, 1))[:, None]
    return (kinship * fading).sum(1)


def history_decay(world: World, target: np.ndarray, ages_seconds: np.ndarray) -> np.ndarray:
    """[B, P], the weight of a behavior at each place for target categories [B, 1]."""
    decay = world.decay[target].astype(np.float32)
    if world.arguments.history_clock == "position":
        return np.exp(-np.arange(world.arguments.max_history, dtype=np.float32) / decay)
    return np.exp(-np.log2(1 + ages_seconds.astype(np.float32) / np.float32(TYPICAL_GAP_SECONDS)) / decay)


def task_effects(world: World, e: Exposures) -> dict[str, np.ndarray]:
    """Name of an effect -> [B, T], before it is scaled; their scaled sum and the intercept make the logit."""
    affinity = np.einsum("tbr,br->bt", world.preferences[:, e.users], world.item_latent[e.items])
    shared = {
        "user": world.user_bias[e.users],
        "price": price_effect(e.price),
        "history": history_effect(world, e),
        "slot": np.asarray(SLOT_VALUES)[e.slots],
    }
    parts = {name: np.repeat(value[:, None], len(TASKS), axis=1) for name, value in shared.items()}
    parts |= {"affinity": affinity / np.sqrt(world.arguments.latent_dim), "item": world.item_quality[:, e.items].T}
    return parts


def true_logits(world: World, e: Exposures, intercepts: np.ndarray) -> np.ndarray:
    """[B, T] logits of P(click), P(like) and P(buy | click)."""
    logits = np.tile(intercepts, (len(e.users), 1))
    for name, value in task_effects(world, e).items():
        logits += value * _sizes(world, name)
    return logits


def logits_without_order(world: World, e: Exposures, logits: np.ndarray) -> np.ndarray:
    """[B, T], what the true logits become where each behavior counts with the mean decay of its history."""
    change = history_effect(world, e, in_order=False) - history_effect(world, e)
    return logits + change[:, None] * _sizes(world, "history")


def _sizes(world: World, name: str) -> np.ndarray:
    return np.array([world.arguments.effect(task, name) for task in TASKS])


def fit_intercepts(world: World) -> np.ndarray:
    """[T], by bisection on a pilot draw, so that labels have their rates (buy: among clicked rows)."""
    rng = np.random.default_rng([world.arguments.seed, _INTERCEPTS])
    pilot = draw_exposures(world, rng, np.full(_PILOT_ROWS, START_SECONDS), training=True)
    logits = true_logits(world, pilot, np.zeros(len(TASKS)))
    click = _bisect(logits[:, 0], np.ones(_PILOT_ROWS), world.arguments.click_rate)
    clicked = sigmoid(logits[:, 0] + click)
    like = _bisect(logits[:, 1], np.ones(_PILOT_ROWS), world.arguments.like_rate)
    return np.array([click, like, _bisect(logits[:, 2], clicked, world.arguments.buy_rate)])


def _bisect(logits: np.ndarray, weights: np.ndarray, rate: float) -> float:
    low, high = -50.0 - logits.max(), 50.0 - logits.min()
    for _ in range(60):
        middle = (low + high) / 2
        too_low = np.average(sigmoid(logits + middle), weights=weights) < rate
        low, high = (middle, high) if too_low else (low, middle)
    return (low + high) / 2


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
