"""A run's data, or ids drawn from its tables -> batches in memory, and what they ask of the tables.

Batches are made before anything is timed: neither decoding nor drawing is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.config import RunConfig
from hmoe_rec.config.encoding import numbers_to_fit
from hmoe_rec.data.parquet import BatchReader, ParquetSource
from hmoe_rec.sharding.process import Process
from hmoe_rec.types import ConfigError, DataError, Features, IdField

BAG_IDS = 5  # mean ids of a bag for which neither the schema nor sharding.pooling says anything
TRAFFIC_BATCHES = 4  # counted
LABEL_SHARE = 0.3


@dataclass(frozen=True)
class Traffic:
    """What batches ask of the tables.

    Attributes:
        ids: key of `Batch.sparse` -> mean number of ids of an example.
        distinct: id field -> different ids over ids, in a batch of all processes; behaviors count with their target.
    """

    ids: dict[str, float]
    distinct: dict[str, float]


def read_batches(config: RunConfig, process: Process, uris: Sequence[str], count: int) -> list[Batch]:
    """This process's part of the first `count` training batches of the run's order; fewer if there are no more.

    Raises:
        DataError: not enough rows for one batch, or a value that cannot be right.
    """
    train = config.train
    reader = BatchReader(
        ParquetSource(uris, config.schema_of_data),
        global_batch_size=train.global_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        shuffle=train.shuffle,
        seed=train.seed,
        lanes=config.data.lanes,
        shuffle_rows=config.data.shuffle_rows,
        num_workers=config.data.num_workers,
        drop_last=True,
    )
    if not reader.steps_per_epoch:
        raise DataError(
            f"{', '.join(uris)}: {reader.num_rows:,} rows do not make a batch of {train.global_batch_size:,}: lower "
            "train.global_batch_size, or draw ids with --zipf"
        )
    epoch = reader.epoch(0)
    batches = [batch for _, batch in zip(range(count), epoch, strict=False)]
    epoch.close()  # type: ignore[attr-defined]
    return batches


def draw_batches(config: RunConfig, process: Process, skew: float, count: int, *, seed: int = 1) -> list[Batch]:
    """Batches with ids of a Zipf law, for a run file whose data need not exist; labels are coins.

    Args:
        skew: the k-th most frequent id of a field is drawn with a probability proportional to k^-skew; 0 = all alike.

    Raises:
        ConfigError: an encoder of numbers needs statistics of data.
    """
    missing = numbers_to_fit(config)
    if missing:
        raise ConfigError(
            f"--zipf: the encoders of {', '.join(missing)} need statistics of real data: give --data, or "
            "data.statistics, or another kind (model.encoding.numbers=scalar)"
        )
    sizes = [len(part) for part in np.array_split(np.arange(config.train.global_batch_size), process.world_size)]
    if not min(sizes):
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} examples for {process.world_size} processes; "
            "expected at least one each"
        )
    generators = [torch.Generator().manual_seed((seed * 1009 + process.rank) * 65537 + i) for i in range(count)]
    return [_draw(config, sizes[process.rank], max(sizes), skew, generator) for generator in generators]


def _draw(config: RunConfig, size: int, share: int, skew: float, generator: torch.Generator) -> Batch:
    features = config.features
    lengths = {
        s.name: _lengths(mean_ids(config, s.columns[0][0]), s.max_length, size, generator) for s in features.sequences
    }
    sequence_of = {column: s.name for s in features.sequences for column, _ in s.columns}
    values: list[Tensor] = []
    of_key: list[Tensor] = []
    for key in features.sparse_keys:
        field = features.id_field(features.targets.get(key, key))
        if key in sequence_of:
            of_key.append(lengths[sequence_of[key]])
        elif field.multi_valued:
            of_key.append(
                _lengths(mean_ids(config, key), config.schema_of_data.id_column(key).max_length, size, generator)
            )
        else:
            of_key.append(torch.ones(size, dtype=torch.int32))
        values.append(zipf_ids(int(of_key[-1].sum()), field.num_embeddings, skew, generator))
    hashed = any(f.hashed for f in features.ids)
    ids = torch.cat(values).to(torch.int64 if hashed else torch.int32)
    labels = (torch.rand(size, len(config.tasks), generator=generator) < LABEL_SHARE).float()
    return Batch(
        sparse=KeyedJaggedTensor(keys=list(features.sparse_keys), values=ids, lengths=torch.cat(of_key), stride=size),
        ages=_ages(features, lengths, size, generator),
        numbers=torch.randn(size, len(features.numbers), generator=generator),
        vectors=torch.randn(size, sum(v.dim for v in features.vectors), generator=generator),
        labels=labels,
        weights=torch.ones(size),
        groups=torch.zeros(size, dtype=torch.int64),
        longest=tuple(int(lengths[s.name].max()) for s in features.sequences),
        row_ids=torch.randint(1 << 62, (size,), generator=generator),  # heads of bootstrap towers ask for them
        share=share,
    )


def zipf_ids(count: int, num_ids: int, skew: float, generator: torch.Generator) -> Tensor:
    """[count] int64 ids in [0, num_ids): rank k in [1, num_ids] with density proportional to k^-skew, then scattered.

    By the inverse of the continuous distribution function. Ranks become ids by one fixed bijection k -> a k mod n, so
    that the frequent ids do not all lie in the first block of a table that is cut by rows.
    """
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    n = float(num_ids) + 1.0
    if abs(skew - 1.0) < 1e-9:
        ranks = n**u
    else:
        ranks = (u * (n ** (1.0 - skew) - 1.0) + 1.0) ** (1.0 / (1.0 - skew))
    ranks = (ranks.long() - 1).clamp(0, num_ids - 1)
    return ranks * _coprime(num_ids) % num_ids


def _coprime(n: int) -> int:
    """A number near the golden section of n without a common divisor."""
    found = max(1, round(0.6180339887 * n))
    while np.gcd(found, n) != 1:
        found += 1
    return found


def mean_ids(config: RunConfig, key: str) -> float:
    """Ids of an example in a bag or sequence: sharding.pooling, else half of what may be there."""
    given = config.sharding.pooling.get(key)
    if given is not None:
        return given
    for sequence in config.features.sequences:
        if key in dict(sequence.columns):
            return sequence.max_length / 2
    longest = config.schema_of_data.id_column(key).max_length
    return BAG_IDS if longest is None else longest / 2


def _lengths(mean: float, longest: int | None, size: int, generator: torch.Generator) -> Tensor:
    """[size] int32 with that mean, evenly spread from 0 to twice the mean, or as far around it as `longest` allows."""
    mean = mean if longest is None else min(mean, longest)
    spread = mean if longest is None else min(mean, longest - mean)
    spot, rounding = torch.rand(2, size, generator=generator, dtype=torch.float64)
    return (mean + spread * (2 * spot - 1) + rounding).int()  # rounded at random, so that the mean stays


def _ages(features: Features, lengths: dict[str, Tensor], size: int, generator: torch.Generator):
    timed = [s.name for s in features.sequences if s.has_ages]
    if not timed:
        return None
    of_sequence = torch.cat([lengths[name] for name in timed])
    seconds = torch.rand(int(of_sequence.sum()), generator=generator) * 1e6
    return KeyedJaggedTensor(keys=timed, values=seconds, lengths=of_sequence, stride=size)


def count_traffic(batches: Sequence[Batch], features: Features, process: Process) -> Traffic:
    """Over a few batches and all processes. A collective call."""
    batches = batches[:TRAFFIC_BATCHES]
    examples, ids = 0, dict.fromkeys(features.sparse_keys, 0)
    different = {f.name: [0, 0] for f in features.ids}
    for batch in batches:
        values = dict(zip(batch.sparse.keys(), batch.sparse.values().split(batch.sparse.length_per_key()), strict=True))
        mine = {field.name: _unique(field, features, values) for field in features.ids}
        everyone = process.gather((len(batch), {key: v.numel() for key, v in values.items()}, mine))
        for size, counts, _ in everyone:
            examples += size
            for key, count in counts.items():
                ids[key] += count
                different[features.targets.get(key) or key][1] += count
        for name in different:
            different[name][0] += len(np.unique(np.concatenate([unique[name] for _, _, unique in everyone])))
    return Traffic(
        ids={key: count / max(1, examples) for key, count in ids.items()},
        distinct={name: rows / looked_up for name, (rows, looked_up) in different.items() if looked_up},
    )


def _unique(field: IdField, features: Features, values: dict[str, Tensor]) -> np.ndarray:
    keys = [field.name, *(column for column, target in features.targets.items() if target == field.name)]
    return torch.cat([values[key] for key in keys]).unique().numpy()
