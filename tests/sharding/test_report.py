"""Reports say what the prediction says: figures, names (escaped), why not; and they stay readable when it is large."""

import io
import json
import math
import random
import re
import time
from dataclasses import replace

import pytest
from rich.console import Console

from hmoe_rec.sharding.figures import exchanges, fixed_cost, format_ranks, set_costs, whole_cost
from hmoe_rec.sharding.prediction import (
    EXCHANGES,
    MEMORY,
    PARTS,
    Alternative,
    PlanPrediction,
    RankPrediction,
    TablePrediction,
)
from hmoe_rec.sharding.report import plan_table
from hmoe_rec.sharding.report_diff import diff_html, diff_table
from hmoe_rec.sharding.report_html import MAX_BARS, bars, plan_html
from hmoe_rec.sharding.report_tables import COLUMNS, MAX_ALTERNATIVES, table_data
from hmoe_rec.types import PlanError
from hmoe_rec.units import format_bytes, format_count, format_ms

MIB, GIB = 2**20, 2**30
PER_NODE = 8


SHARES = (0.1, 0.0, 0.2, 0.1, 0.1, 0.4, 0.1)  # of the parts in the time of a table


def parts_of(ms: float) -> dict[str, float]:
    return dict(zip(PARTS, (share * ms for share in SHARES), strict=True))


def rank_of(rank: int, gib: tuple[float, ...], ms: dict[str, float]) -> RankPrediction:
    hbm: dict[str, int] = dict(zip(MEMORY, (round(x * GIB) for x in gib), strict=True))
    return RankPrediction(rank, hbm, dict.fromkeys(MEMORY, 0), ms)


def table_of(name: str, embedding_set: str, ranks: tuple[int, ...], gib: float, ms: float, **fields) -> TablePrediction:
    given = {"module": "lookup.collection", "field": name, "rows": 1_000_000, "dim": 16, "data_type": "fp32"}
    given |= {"sharding_type": "table_wise", "kernel": "fused", "ddr_bytes": 0}
    given |= {"table": name, "embedding_set": embedding_set, "ranks": ranks, "hbm_bytes": round(gib * GIB)}
    given |= {"ms": parts_of(ms), "slowest_ms": ms / len(ranks)}
    return TablePrediction(**(given | fields))


def small() -> PlanPrediction:
    """Three ranks and three tables. Rank 1 is the fullest (7.5 GiB) and the busiest (9 ms; the mean is 6)."""
    ways = (
        Alternative("row_wise", "fused", 3.5, 2 * GIB, shards=3),
        Alternative("column_wise", "fused", 4.25, 3 * GIB, shards=2),
        Alternative("data_parallel", "dense", 0.5, 5 * GIB, "leaves the optimizer of the tables"),
        Alternative("grid_shard", "fused", None, None, "needs [2] nodes, there is 1"),
    )
    cut = {"sharding_type": "row_wise", "rows": 40_000_000, "alternatives": ways[1:]}
    cut["sent"] = dict(zip(EXCHANGES, (MIB, 5 * MIB, 7 * MIB), strict=True))
    return PlanPrediction(
        topology={"name": "tiny", "nodes": 1, "ranks_per_node": 3, "hbm_bytes": 10 * GIB, "hbm_bandwidth": 3.35e12},
        batch_size=512,
        ranks=(
            rank_of(0, (1, 0.25, 0.5, 1.25), parts_of(4.0)),
            rank_of(1, (5, 0.5, 0.75, 1.25), parts_of(9.0)),
            rank_of(2, (1, 0.5, 0.75, 1.25), parts_of(5.0)),
        ),
        tables=(
            table_of("user", "shared", (1,), 4.5, 5.0, alternatives=ways),
            table_of("item", "shared", (0, 1, 2), 3.0, 12.0, **cut),
            table_of("city", "click", (2,), 0.25, 1.0, alternatives=ways[3:]),
        ),
        seconds=1.5,
        planner={"name": "hmoe_rec"},
        notes=("dense part is not counted",),
    )


def large(num_ranks: int = 2048, num_tables: int = 5000) -> PlanPrediction:
    """Every rank and every table is another; half of the tables lie on all ranks."""
    rng = random.Random(1)
    everyone = tuple(range(num_ranks))

    def figures(n: int, scale: float) -> tuple[float, ...]:
        return tuple(rng.uniform(0.5, 1.5) * scale for _ in range(n))

    def ways() -> tuple[Alternative, ...]:
        kinds = ("column_wise", "table_row_wise", "grid_shard", "row_wise")
        possible = [Alternative(k, "fused_uvm_caching", rng.uniform(0.1, 9), rng.randrange(2**34)) for k in kinds]
        reason = "a shard of {:.1f} GiB does not fit into the 79.0 GiB of a rank"
        why = [Alternative(k, "fused", None, None, reason.format(rng.uniform(80, 900))) for k in kinds]
        return (*sorted(possible, key=lambda a: a.ms or 0), *why)

    tables = []
    for i in range(num_tables):
        cut = {"sharding_type": "row_wise"} if i % 2 else {}
        ranks = tuple(everyone) if i % 2 else (rng.randrange(num_ranks),)
        size = {"rows": rng.randrange(10**4, 10**9), "alternatives": ways()}
        tables.append(
            table_of(f"table_{i:04d}_of_a_field", f"set{i % 4}", ranks, 3.3, rng.uniform(0.1, 9), **cut, **size)
        )
    topology = {"name": "h100x8", "nodes": num_ranks // 8, "ranks_per_node": 8, "hbm_bytes": 79 * GIB}
    ranks = tuple(rank_of(r, figures(4, 12), dict(zip(PARTS, figures(7, 2), strict=True))) for r in everyone)
    return PlanPrediction(topology, 2048, ranks, tuple(tables), 61.25, {"name": "hmoe_rec"})


def printed(report, *predictions: PlanPrediction, width: int = 160, **options) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    report(*predictions, console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, start: str, which: int = 0) -> list[str]:
    """Cells of the first row (or another one) of the terminal's tables that starts so."""
    line = [line for line in text.splitlines() if line.lstrip("│┃ ").startswith(start)][which]
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------------- terminal


def test_terminal_says_memory_and_time():
    text = printed(plan_table, small())
    assert "tiny, 1 node: 3 ranks, batch 512 per rank, 3 tables" in text
    assert row(text, "tables ") == ["tables", "1.0 GiB", "2.3 GiB", "5.0 GiB", "50.0 %"]
    assert row(text, "total") == ["total", "3.0 GiB", "4.7 GiB", "7.5 GiB", "75.0 %"]
    assert row(text, "free on rank 1")[3] == "2.5 GiB"
    assert row(text, "lookup forward") == ["lookup forward", "1.20", "1.80", "20.0 %"]
    assert row(text, "all ")[1:3] == ["6.00", "9.00"]
    assert row(text, "imbalance")[2] == "1.50"
    assert row(text, "1 ") == ["1", "1", "7.5 GiB", "75.0 %", "9.00"]
    assert "note: dense part is not counted" in text


def test_terminal_says_tables_and_sets():
    text = printed(plan_table, small(), width=200)
    item = row(text, "item")
    assert item[:8] == ["item", "shared", "40.0M x 16 fp32", "row_wise fused", "0-2", "3.0 GiB", "4.00", "66.7 %"]
    assert item[8] == "column_wise: 4.25 ms, 3.0 GiB on each of 2"
    assert row(text, "user")[-1] == "row_wise: 3.50 ms, 2.0 GiB on each of 3"
    assert row(text, "city")[-1] == "none: needs [2] nodes, there is 1"
    order = [text.index(f"│ {name} ") for name in ("item", "user", "city")]
    assert order == sorted(order)
    # 17 ms of both tables over 3 ranks, of which three tenths are all-to-alls
    sizes, times = ["2", "41.0M", "656.0M", "7.5 GiB"], ["1.70", "3.97", "5.67", "94.4 %"]
    assert row(text, "shared") == ["shared", *sizes, "1.0 MiB", "5.0 MiB", "7.0 MiB", *times]
    assert row(text, "click")[5:8] == ["0 B"] * 3
    assert row(text, "all ", -1)[5:8] == ["1.0 MiB", "5.0 MiB", "7.0 MiB"]
    assert "2 sets, 2 exchanges of ids in a step" in text


def test_what_a_set_sends_is_whole_where_the_terminal_is_narrow():
    assert row(printed(plan_table, small(), width=100), "shared")[3] == "13.0 MiB"


def test_tables_that_read_the_same_in_several_sets_share_a_row():
    tables = tuple(table_of("item", f"set{i}", (i, i + 1), 1, 2, table=f"set{i}__item") for i in range(3))
    shown = row(printed(plan_table, replace(small(), tables=tables), max_tables=1, width=200), "item")
    assert shown[1] == "set0, set1, set2" and shown[4:8] == ["0-3", "1.0 GiB", "1.00", "100.0 %"]


def test_another_set_is_no_further_exchange_of_ids():
    one = replace(small(), tables=small().tables[:1])
    more = replace(one, tables=tuple(replace(one.tables[0], embedding_set=f"s{i}", table=f"t{i}") for i in range(4)))
    assert exchanges(one) == exchanges(more) == 1
    assert exchanges(replace(one, ranks=one.ranks[:1])) == 0
    assert "one rank: nothing is sent" in printed(plan_table, replace(one, ranks=one.ranks[:1]))


def test_sets_and_fixed_costs_add_up_to_the_mean_rank():
    assert fixed_cost(small()) is None
    late = tuple(replace(r, ms={**r.ms, "input_all_to_all": r.ms["input_all_to_all"] + 0.5}) for r in small().ranks)
    plan = replace(small(), ranks=late)
    fixed, whole = fixed_cost(plan), whole_cost(plan)
    assert fixed is not None and fixed.total_ms == pytest.approx(0.5) == fixed.exchange_ms
    mean = sum(rank.total_ms for rank in plan.ranks) / 3
    assert sum(cost.total_ms for cost in (*set_costs(plan), fixed)) == pytest.approx(mean) == whole.total_ms
    text = printed(plan_table, plan)
    assert row(text, "fixed costs")[8:] == ["0.500", "0.00", "0.500", "7.7 %"]
    cell = "<td>fixed costs</td>"
    assert cell in plan_html(plan, "x") and cell not in plan_html(small(), "x")


def test_reserved_memory_alone_is_not_shown():
    ranks = tuple(replace(rank, ddr={"reserved": GIB}) for rank in small().ranks)
    assert "DDR" not in printed(plan_table, replace(small(), ranks=ranks))
    ranks = tuple(replace(rank, ddr={"reserved": GIB, "tables": GIB}) for rank in small().ranks)
    text = printed(plan_table, replace(small(), ranks=ranks))
    assert "DDR per rank" in text and row(text, "1 ")[4] == "2.0 GiB"


def test_terminal_says_what_is_missing():
    cramped = replace(small(), topology={"name": "tiny", "hbm_bytes": 6 * GIB})
    assert row(printed(plan_table, cramped), "missing on rank 1")[3] == "1.5 GiB"


def test_terminal_without_a_capacity_or_alternatives():
    unknown = replace(small(), topology={}, tables=(table_of("t", "s", (0,), 1, 1),))
    text = printed(plan_table, unknown)
    assert "custom cluster: 3 ranks" in text and "none tried" in text and "free" not in text


def test_identical_ranks_share_a_row_and_many_tables_are_cut():
    alike = tuple(replace(small().ranks[0], rank=rank) for rank in range(2048))
    tables = tuple(table_of(f"t{i}", "shared", (i,), 1, 1) for i in range(40))
    text = printed(plan_table, replace(small(), ranks=alike, tables=tables), max_tables=7)
    assert row(text, "0-2047") == ["0-2047", "2,048", "3.0 GiB", "30.0 %", "4.00"]
    assert "and 33 other tables" in text
    assert len(text.splitlines()) < 70


def test_many_different_ranks_are_cut():
    text = printed(plan_table, large(512, 50))
    assert "and 504 other ranks" in text and len(text.splitlines()) < 140


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_tables_fit_the_terminal(width):
    text = printed(plan_table, large(16, 5), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # which would stand for digits


def test_names_are_not_read_as_markup():
    table = table_of("[red]x[/blue]", "[bold]s", (0,), 1, 1)
    text = printed(plan_table, replace(small(), tables=(table,), notes=("[/nonsense]",)))
    assert "[red]x[/blue]" in text and "[bold]s" in text and "[/nonsense]" in text


@pytest.mark.parametrize("missing", ["ranks", "tables"])
def test_an_empty_prediction_is_refused(missing):
    empty = replace(small(), **{missing: ()})
    with pytest.raises(PlanError, match=f"no {missing}"):
        plan_table(empty, Console(file=io.StringIO()))
    with pytest.raises(PlanError, match=f"no {missing}"):
        plan_html(empty, "x")
    with pytest.raises(PlanError, match=f"no {missing}"):
        diff_table(small(), empty, Console(file=io.StringIO()))


# ------------------------------------------------------------------------------------------------------------ two plans


def test_diff_of_equal_plans_changes_nothing():
    text = printed(diff_table, small(), small())
    assert "the same for all 3 tables" in text
    assert row(text, "ms, busiest rank") == ["ms, busiest rank", "9.00", "9.00", "same", "+0.0"]


def test_diff_says_what_changed():
    before = small()
    user, item, city = before.tables
    moved = replace(user, sharding_type="row_wise", ranks=(0, 1, 2), ms=dict.fromkeys(PARTS, 1.5), slowest_ms=3.5)
    wider = replace(city, dim=32)
    new = table_of("new", "click", (0,), 1.0, 2.0)
    lighter = replace(before.ranks[1], hbm={**before.ranks[1].hbm, "tables": 3 * GIB}, ms={"lookup_forward": 7.0})
    after = replace(before, tables=(moved, wider, new), ranks=(before.ranks[0], lighter, before.ranks[2]))
    text = printed(diff_table, before, after, width=180)
    assert row(text, "user")[1:3] == ["table_wise fused on 1", "row_wise fused on 0-2"]
    assert row(text, "user")[5:] == ["5.00", "3.50"]
    assert row(text, "item")[1:3] == ["row_wise fused on 0-2", "not there"]
    assert row(text, "new")[1:3] == ["not there", "table_wise fused on 0"]
    assert "1,000,000 x 16 fp32 of click" in text and "1,000,000 x 32 fp32 of click" in text
    assert row(text, "HBM tables, most of a rank") == [
        "HBM tables, most of a rank",
        *("5.0 GiB", "3.0 GiB", "-2.0 GiB", "-40.0"),
    ]
    assert row(text, "ms, busiest rank") == ["ms, busiest rank", "9.00", "7.00", "-2.00", "-22.2"]
    assert "changed: 4 tables, the same: 0" in text
    assert "and 3 other changed tables" in printed(diff_table, before, after, max_tables=1)


def test_diff_says_what_sets_cost_before_and_after():
    before = small()
    item = replace(before.tables[1], table="new__item", embedding_set="new")
    after = replace(before, tables=(*before.tables, item))
    text = printed(diff_table, before, after, width=180)
    assert row(text, "new ") == ["new", "-", "3.0 GiB", "-", "13.0 MiB", "-", "4.00"]
    assert row(text, "shared")[1:5] == ["7.5 GiB", "7.5 GiB", "13.0 MiB", "13.0 MiB"]
    assert row(text, "vectors sent")[1:] == ["5.0 MiB", "10.0 MiB", "+5.0 MiB", "+100.0"]
    assert row(text, "exchanges of ids")[1:4] == ["2", "2", "same"]


def test_diff_as_a_page():
    before, bad = small(), "</script><b>"
    after = replace(before, tables=(replace(before.tables[0], dim=32, embedding_set=bad), *before.tables[1:]))
    page = diff_html(before, after, bad, [f"plan: world size: 2 -> {bad}"])
    assert page.count("</script>") == 2 and "<b>" not in page
    assert "1,000,000 x 32 fp32 of &lt;/script&gt;" in page and "world size: 2 -&gt; " in page
    assert "9.00 → 9.00" in page and "changed: 1 table, the same: 2" in page
    assert "changed: 0 tables, the same: 3" in diff_html(before, before, "x")


# ----------------------------------------------------------------------------------------------------------------- page


def test_page_has_the_figures_of_the_prediction():
    plan = small()
    page = plan_html(plan, "A plan")
    for figure in ("9.00 ms", "7.5 GiB", "75.0 % of 10.0 GiB", "1.50", "3,350.0 GB/s", "5.67", "94.4 %", "7.0 MiB"):
        assert figure in page, figure
    assert "dense part is not counted" in page
    data = data_of(page)
    for table, entries in zip(plan.tables, data["tables"], strict=True):
        t = dict(zip(data["columns"], entries, strict=True))
        words = {name: data["words"][t[name]] for name in ("module", "set", "field", "type", "sharding", "kernel")}
        assert list(words.values()) == [
            *(table.module, table.embedding_set, table.field, table.data_type, table.sharding_type, table.kernel)
        ]
        assert (t["table"], t["rows"], t["dim"], t["hbm"]) == (table.table, table.rows, table.dim, table.hbm_bytes)
        assert t["ms"] == pytest.approx(list(table.ms.values()), rel=1e-5)
        assert t["slowest_ms"] == pytest.approx(table.slowest_ms, rel=1e-5)
        assert t["sent"] == [table.sent.get(part, 0) for part in EXCHANGES]
        shown = [
            (data["words"][a], data["words"][k], ms, hbm, data["words"][why] if why >= 0 else None, ranks)
            for a, k, ms, hbm, why, ranks in data["alternatives"][t["alternatives"]]
        ]
        ways = table.alternatives
        assert shown == [(a.sharding_type, a.kernel, a.ms, a.hbm_bytes, a.impossible, a.shards) for a in ways]


def test_bars_have_the_heights_of_the_ranks():
    page = plan_html(small(), "x")
    chart = page[page.index("HBM per rank") :]
    heights = [float(h) for h in re.findall(r'<i class="c\d" style="height:([\d.]+)%"', chart)][: 3 * len(MEMORY)]
    limit = float(re.search(r'class="limit" style="bottom:([\d.]+)%', chart)[1])  # type: ignore[index]
    expected = [rank.hbm[kind] / (10 * GIB) for rank in small().ranks for kind in MEMORY]
    assert [h / limit for h in heights] == pytest.approx(expected, abs=2e-3)


def test_many_ranks_are_drawn_as_few_bars_of_whole_nodes():
    plan = large(2048, 1)
    shown = bars(plan, lambda rank: rank.ms, PARTS)
    assert len(shown) <= MAX_BARS and {len(bar.ranks) % PER_NODE for bar in shown} == {0}
    assert [r for bar in shown for r in bar.ranks] == list(range(2048))
    assert max(bar.total for bar in shown) == pytest.approx(plan.critical_ms)
    assert min(bar.least for bar in shown) == pytest.approx(min(rank.total_ms for rank in plan.ranks))
    assert len(bars(large(100, 1), lambda rank: rank.ms, PARTS)) == 13  # nodes of 8, the last one of 4


def test_page_needs_nothing_from_elsewhere():
    page = plan_html(small(), "x")
    assert not re.search(r"https?://|//\w+\.\w|\bsrc=|<link|@import|url\(|\beval\b|innerHTML", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_names_are_escaped_everywhere():
    bad = '</script><img src=x onerror="a()">&'
    table = table_of(bad, bad, (0,), 1, 1, module=bad, field=bad, data_type=bad, sharding_type=bad, kernel=bad)
    table = replace(table, alternatives=(Alternative(bad, bad, None, None, bad),))
    topology = {"name": bad, bad: bad, "hbm_bytes": GIB}
    page = plan_html(
        replace(small(), tables=(table,), topology=topology, notes=(bad,), planner={bad: bad}),
        bad,
    )
    assert "<img" not in page and page.count("</script>") == 2
    assert data_of(page)["tables"][0][0] == bad


def test_figures_that_are_not_finite_do_not_break_the_page():
    table = replace(small().tables[0], alternatives=(Alternative("row_wise", "fused", math.inf, None),))
    page = plan_html(replace(small(), tables=(table,)), "x")
    assert data_of(page)["alternatives"][0][0][2] is None


def test_times_of_zero_are_drawn():
    still = tuple(replace(rank, ms={}, hbm={}) for rank in small().ranks)
    idle = tuple(replace(table, ms={}) for table in small().tables)
    page = plan_html(replace(small(), ranks=still, tables=idle), "x")
    assert "0.00 ms" in page and "nan" not in page
    assert "0.00" in printed(plan_table, replace(small(), ranks=still, tables=idle))


def test_alternatives_are_left_out_where_they_are_too_many():
    ways = [Alternative("row_wise", f"k{i}", float(i), 1) for i in range(30)]
    why = [Alternative("grid_shard", f"k{i}", None, None, "too few nodes") for i in range(3)]
    tables = tuple(table_of(f"t{i}", "s", (0,), 1, 1, alternatives=(*ways, *why)) for i in range(4000))
    data = table_data(replace(small(), tables=tables))
    entries = dict(zip(data["columns"], data["tables"][0], strict=True))
    shown = data["alternatives"][entries["alternatives"]]
    assert len(shown) == MAX_ALTERNATIVES // 4000 == 10 and entries["left_out"] == 23
    assert [data["words"][a[1]] for a in shown] == [*(f"k{i}" for i in range(7)), "k0", "k1", "k2"]


def test_a_large_plan_is_a_small_page_soon():
    plan = large()
    start = time.process_time()
    page = plan_html(plan, "large")
    assert time.process_time() - start < 3
    assert len(page.encode()) < 3_000_000
    assert len(data_of(page)["tables"]) == 5000
    start = time.process_time()
    printed(plan_table, plan)
    assert time.process_time() - start < 3


def test_columns_name_every_entry():
    data = table_data(small())
    assert all(len(entries) == len(COLUMNS) for entries in data["tables"])


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ((3,), "3"),
        ((2, 1, 0), "0-2"),
        ((0, 0, 1), "0-1"),
        ((0, 2, 3, 8), "0, 2-3, 8"),
        (tuple(range(0, 20, 2)), "0, 2, 4, 6, ... (10 ranks)"),
        ((), "-"),
    ],
)
def test_ranks_read_as_runs(ranks, text):
    assert format_ranks(ranks) == text


def test_units():
    assert [format_bytes(x) for x in (0, 1023, 1536, GIB, 5000 * 2**40)] == [
        *("0 B", "1,023 B", "1.5 KiB", "1.0 GiB", "5,000.0 TiB")
    ]
    assert [format_ms(x) for x in (0, 0.00123, 0.1, 1.5, 1234.5, math.inf)] == [
        *("0.00", "0.0012", "0.100", "1.50", "1,234.50", "-")
    ]
    assert [format_count(x) for x in (999, 999_999, 25e6, 3.1e10)] == ["999", "999,999", "25.0M", "31.0G"]
