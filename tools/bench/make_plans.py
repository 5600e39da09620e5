"""Plan files that differ on purpose, for `hmoe-rec bench plan`: good ones, lopsided ones, random ones.

    python tools/bench/make_plans.py configs/benchmark.yaml --out runs/plans
    hmoe-rec bench plan configs/benchmark.yaml --zipf 0.8 --plans auto,row_wise,runs/plans

A table is large if it is one of the largest that together hold nine tenths of all rows.
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from hmoe_rec.config import load_config
from hmoe_rec.sharding.constraints import SEPARATOR, UNPOOLED_TYPES, Constraint, Constraints
from hmoe_rec.sharding.estimate import read_tables
from hmoe_rec.sharding.options import Table, fills
from hmoe_rec.sharding.planner import cluster_of_job, plan_for
from hmoe_rec.sharding.topology import cluster_of
from hmoe_rec.training.build import unsharded

LARGE_SHARE = 0.9
Choice = dict[str, tuple[str, int | None]]  # table -> sharding type, process of a whole table (None = any)


def large_tables(tables: list[Table]) -> set[str]:
    found, rows = set(), 0
    for table in sorted(tables, key=lambda t: -t.rows):
        if rows >= LARGE_SHARE * sum(t.rows for t in tables):
            break
        found.add(table.name)
        rows += table.rows
    return found


def choices(tables: list[Table], world_size: int) -> dict[str, Choice]:
    """Name of the plan -> what becomes of each table."""
    large = large_tables(tables)
    sets = list(dict.fromkeys(t.name.split(SEPARATOR)[0] for t in tables))
    result: dict[str, Choice] = {
        "skewed": {t.name: ("table_wise", 0) for t in tables},
        "three_to_one": {t.name: ("table_wise", 0 if i % 4 else world_size - 1) for i, t in enumerate(tables)},
        "set_by_set": {t.name: ("table_wise", sets.index(t.name.split(SEPARATOR)[0]) % world_size) for t in tables},
        "large_by_row": {t.name: ("row_wise", None) if t.name in large else ("table_wise", 0) for t in tables},
        "small_by_row": {t.name: ("table_wise", None) if t.name in large else ("row_wise", None) for t in tables},
        "large_by_column": {t.name: ("column_wise", None) if t.name in large else ("table_wise", None) for t in tables},
    }
    for seed in (1, 2, 3):
        rng = random.Random(seed)
        draws = {t.name: (rng.choice(UNPOOLED_TYPES), rng.randrange(world_size)) for t in tables}
        result[f"random_{seed}"] = {n: (k, r if k == "table_wise" else None) for n, (k, r) in draws.items()}
    return result


def constraints_of(choice: Choice, tables: list[Table], world_size: int) -> Constraints:
    """A table that its type cannot cut stays whole."""
    rules = {}
    for table in tables:
        kind, rank = choice[table.name]
        cut = {"row_wise": fills(table.rows, world_size), "column_wise": table.dim % (4 * world_size) == 0}
        kind = kind if cut.get(kind, True) else "table_wise"
        ranks = () if rank is None else (rank,)
        rules[table.name] = Constraint(types=(kind,), ranks=ranks, min_partition=4)
    return Constraints(rules)


def make(module: nn.Module, world_size: int, out: Path) -> list[Path]:
    cluster = cluster_of_job(cluster_of("cpu"), world_size, world_size, "cpu")
    tables, _ = read_tables(module, Constraints(), cluster)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, choice in choices(tables, world_size).items():
        constraints = constraints_of(choice, tables, world_size)
        planned = plan_for(module, cluster, constraints=constraints, reserved=0.0)
        written.append(out / f"{name}.json")
        planned.save(module, str(written[-1]))
    return written


def main(
    config: Annotated[str, typer.Argument(help="A run file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the plan files.")] = Path("runs/plans"),
    world_size: Annotated[int, typer.Option(help="Processes, on one machine.")] = 2,
) -> None:
    """Write the plan files."""
    written = make(unsharded(load_config(config, overrides or []), "cpu"), world_size, out)
    print(f"{len(written)} plans in {out}: {', '.join(path.stem for path in written)}")


if __name__ == "__main__":
    typer.run(main)
