"""Regret on the simulated market: figures of the table by hand, files, and names that are not there."""

import json

import pytest
import regret
import typer

from hmoe_rec.explore.environment import Market


def made(policy: str, seed: int, lost: float, cold: float) -> regret.Run:
    return regret.Run(policy, seed, [lost, 1.0], [cold, 0.0], clicks=5.0, cold_requests=10.0, cold_shown=4.0)


def test_the_table_is_paired_by_seed():
    """20 requests, of which the best ad is new in 10; UCB loses 1 and 2 clicks less on them."""
    runs = {
        "greedy": [made("greedy", 1, 3.0, 2.0), made("greedy", 2, 5.0, 4.0)],
        "UCB 1": [made("UCB 1", 1, 4.0, 1.0), made("UCB 1", 2, 3.0, 2.0)],
    }
    greedy, ucb = regret.summary(runs, Market(rounds=2, requests=10))
    assert (greedy["regret"], ucb["regret"]) == (250.0, 225.0)
    assert ucb["cold_regret"] == 150.0 and ucb["cold_regret_minus_greedy"] == -150.0
    assert ucb["cold_regret_error"] == pytest.approx(50.0) and ucb["cold_regret_better"] == 2
    assert ucb["regret_minus_greedy"] == -25.0 and ucb["regret_error"] == pytest.approx(75.0)
    assert ucb["clicks"] == 250.0 and ucb["new_shown"] == pytest.approx(0.2)
    assert "| UCB 1 | 225.0 ±35.4 | -25.0 ±75.0 | 150.0 ±70.7 | -150.0 ±50.0 | 2 of 2 |" in regret.markdown(
        [greedy, ucb], 2
    )


def test_a_short_run_writes_numbers_a_table_and_a_picture(tmp_path, capsys):
    options = {"rounds": 4, "requests": 30, "arrivals": 2, "quality_std": 1.0}
    regret.main(seeds="1,2", policies="greedy,UCB 1", jobs=1, out=tmp_path, **options)
    assert capsys.readouterr().out.strip() == (tmp_path / "regret.md").read_text().strip()
    assert (tmp_path / "regret.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "regret.json").read_text())
    assert content["market"]["arrivals"] == 2 and len(content["runs"]) == 4
    of_seed_1 = [r for r in content["runs"] if r["seed"] == 1]
    assert len({r["cold_requests"] for r in of_seed_1}) == 1, "all policies meet the same requests"
    with pytest.raises(typer.BadParameter, match="policy 'UCB 7'; expected some of greedy"):
        regret.main(policies="UCB 7", out=tmp_path)
