"""The studies of online learning: hours are cut in order, figures are drawn, a lost or repeated row is noticed."""

import online
import online_kills
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer


def test_a_log_is_cut_into_its_first_days_and_hours(tmp_path):
    times = [day * 24 * online.HOUR_MS + hour * online.HOUR_MS + 5 for day in range(3) for hour in (0, 0, 2, 23)]
    for split, part in zip(online.SPLITS, (times[8:], times[:3], times[3:8]), strict=True):
        pq.write_table(pa.table({"time_ms": part}), tmp_path / f"{split}.parquet")
    first, hours = online.write_hours(tmp_path, tmp_path / "out", first_days=1)
    assert pq.read_table(first)["time_ms"].to_pylist() == times[:4]
    files = sorted(hours.glob("*.parquet"))
    assert [file.stem for file in files] == [f"hour-{h:04d}" for h in (24, 26, 47, 48, 50, 71)]
    assert [t for file in files for t in pq.read_table(file)["time_ms"].to_pylist()] == times[4:]


def test_hours_are_printed_and_drawn(tmp_path, capsys):
    def figures(ne: float) -> dict[str, dict[str, float]]:
        return {"click": {"ne": ne, "auc": 0.7, "calibration": 1.0}}

    def runs(ne: float) -> list[tuple]:
        return [([figures(ne + seed / 100), figures(ne)], figures(ne + seed / 100)) for seed in (1, 3)]

    results = {"trained once": runs(0.95), "goes on": runs(0.9)}
    online.print_hours(results)
    assert "-500.0 ±0.0" in capsys.readouterr().out
    online.draw_hours(results, tmp_path / "hours.png")
    assert (tmp_path / "hours.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("learned", "weight"), [([1, 0, 1], 1.0), ([1, 2, 1], 1.0), ([1, 1, 1], 1.1)])
def test_a_lost_row_a_repeated_one_and_another_parameter_are_noticed(learned, weight, capsys):
    undisturbed = {"model.w": torch.ones(5), "audit.learned": torch.ones(3)}
    online_kills.report(undisturbed, undisturbed, ["window 3"], 3)
    with pytest.raises(typer.Exit):
        killed = {"model.w": torch.full((5,), weight), "audit.learned": torch.tensor(learned)}
        online_kills.report(undisturbed, killed, ["window 3"], 3)
    assert "killed 1 times, after: window 3" in capsys.readouterr().out
