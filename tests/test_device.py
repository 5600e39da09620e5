"""A run that was trained on a GPU, on a machine without one: what every command says, and that --device cpu helps."""

from pathlib import Path

import pytest
import torch
from small_run import make_log, run_file

from hmoe_rec import cli
from hmoe_rec.config import resolve_config
from hmoe_rec.training.trainer import train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    make_log(folder)
    train(resolve_config(run_file(folder, "run", max_steps=3)))
    config = folder / "run" / "config.yaml"
    text = config.read_text()
    assert "device: auto" in text
    config.write_text(text.replace("device: auto", "device: cuda"))
    return folder


def status_of(*arguments: str) -> int | None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments])
    return stopped.value.code  # type: ignore[return-value]


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "RUN"),
        ("predict", "RUN", "--data", "TEST", "--out", "OUT/predictions.parquet"),
        ("uncertainty", "fit", "RUN", "--kind", "laplace"),
        ("analyze", "gates", "RUN", "--out", "OUT"),
        ("analyze", "calibration", "RUN", "--out", "OUT"),
        ("analyze", "entanglement", "RUN", "--out", "OUT"),
        ("analyze", "correlation", "RUN", "--out", "OUT", "--positions", "2", "--categories", "2"),
        ("analyze", "transfer", "RUN", "RUN", "--out", "OUT"),
        pytest.param(("analyze", "all", "RUN", "--out", "OUT"), marks=pytest.mark.slow),
    ],
    ids=lambda command: "-".join(command[:2]).lower(),
)
def test_a_run_of_a_gpu_is_read_on_a_cpu(log, tmp_path, capsys, command):
    places = {"RUN": str(log / "run"), "TEST": str(log / "test.parquet"), "OUT": str(tmp_path)}
    given = [places.get(word, word.replace("OUT/", f"{tmp_path}/")) for word in command]
    assert status_of(*given) == 2
    assert "finds no GPU here" in (message := capsys.readouterr().err) and "--device cpu" in message
    assert status_of(*given, "--device", "tpu") == 2
    assert "device 'tpu': expected auto, cpu, cuda" in capsys.readouterr().err
    assert status_of(*given, "--device", "cpu") == 0
    assert not status_of(*given[:2], "--help")
    assert "--device" in capsys.readouterr().out


def test_variances_of_a_run_of_a_gpu_are_judged_on_a_cpu(log, capsys):
    run = str(log / "run")
    assert status_of("uncertainty", "fit", run, "--kind", "laplace", "--device", "cpu") == 0
    assert status_of("evaluate", run, "--uncertainty", "laplace") == 2
    assert status_of("evaluate", run, "--uncertainty", "laplace", "--device", "auto") == 0
