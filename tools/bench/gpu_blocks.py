"""The blocks of gpu.py; `python gpu_blocks.py NUMBER RESULTS.json DEVICE SECONDS` runs one.

A block adds what it finds to its Results; `failures` among them, or an exception, fails it.
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu import ROOT, Results
from torch import Tensor
from torch.utils._pytree import tree_leaves

ALLOWED = ROOT / "tools" / "device_lint" / "allowed.json"


class Bench:
    """What every block gets: a device, a scratch folder with the small log of the tests, and its results."""

    def __init__(self, results: Results, device: str, seconds: float) -> None:
        from small_run import make_log

        self.results, self.device, self.until = results, device, time.perf_counter() + seconds
        self.folder = Path(tempfile.mkdtemp(prefix="hmoe_gpu_"))
        self.failures: list[str] = []
        make_log(self.folder)

    def is_over(self) -> bool:
        return time.perf_counter() > self.until

    def check(self, name: str, ok: bool, value: Any) -> None:
        """Adds a finding; one that is not ok fails the block at its end."""
        self.results.add(name, value)
        if not ok:
            self.failures.append(f"{name}: {value}")
            self.results.add("failures", self.failures)

    def run_file(self, run: str, **train: Any) -> dict[str, Any]:
        from small_run import run_file

        content = run_file(self.folder, run, **({"device": self.device, "log_every": 1000} | train))
        content["model"]["dropout"] = 0.0
        return content

    def train(self, content: dict[str, Any]) -> dict[str, Any]:
        from hmoe_rec.config import resolve_config
        from hmoe_rec.training.trainer import train

        with contextlib.redirect_stdout(io.StringIO()):
            return train(resolve_config(content))

    def command(self, *words: str) -> str:
        """An `hmoe-rec` command in a process of its own. -> its output."""
        done = subprocess.run([sys.executable, "-m", "hmoe_rec", *words], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"hmoe-rec {' '.join(words)}: {done.stderr[-1500:]}")
        return done.stdout


def close(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of the test log losses of two reports."""
    tasks = one["test"].keys()
    return max(
        abs(one["test"][t]["logloss"] - other["test"][t]["logloss"]) for t in tasks if "logloss" in one["test"][t]
    )


# ------------------------------------------------------------------------------------------------------------ blocks


def doctor(bench: Bench) -> None:
    """0: versions and devices; one lookup of FBGEMM forward and backward, against an index_add."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    from hmoe_rec.doctor import diagnose

    report = diagnose()
    bench.check("doctor", report.ok, {"devices": report.devices, "problems": report.problems, **report.versions})
    cuda = bench.device == "cuda"
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    lookup = SplitTableBatchedEmbeddingBagsCodegen(
        [(11, 8, *place)], learning_rate=0.1, device=torch.device(bench.device)
    )
    ids, offsets = torch.tensor([1, 4, 4, 9, 0]), torch.tensor([0, 2, 2, 5])
    before = lookup.split_embedding_weights()[0].detach().cpu().clone()
    out = lookup(ids.to(bench.device), offsets.to(bench.device))
    expected = torch.stack([before[[1, 4]].sum(0), torch.zeros(8), before[[4, 9, 0]].sum(0)])
    error = (out.detach().cpu() - expected).abs().max().item()
    out.sum().backward()
    moved = (lookup.split_embedding_weights()[0].detach().cpu() - before).abs().sum(1) > 0
    bench.check("fbgemm forward error", error < 1e-6, error)
    bench.check(
        "fbgemm rows moved", moved.nonzero().flatten().tolist() == [0, 1, 4, 9], moved.nonzero().flatten().tolist()
    )


def runs(bench: Bench) -> None:
    """1: pipelines agree, a run resumes, also on the other device, and waits only where the lint says."""
    reports = {
        p: bench.train(bench.run_file(f"run_{p}", pipeline=p, epochs=1, evaluate_every=4)) for p in ("plain", "base")
    }
    if bench.device == "cuda":
        reports["sparse_dist"] = bench.train(
            bench.run_file("run_sparse", pipeline="sparse_dist", epochs=1, evaluate_every=4)
        )
    for name, report in reports.items():
        bench.check(f"{name} against plain", close(report, reports["plain"]) < 1e-4, close(report, reports["plain"]))
    on_cpu = bench.train(bench.run_file("run_cpu", device="cpu", epochs=1, evaluate_every=4))
    bench.check("device against CPU", close(reports["plain"], on_cpu) < 1e-3, close(reports["plain"], on_cpu))
    for first, then in ((bench.device, bench.device), ("cpu", bench.device), (bench.device, "cpu")):
        name = f"resume {first} to {then}"
        bench.train(bench.run_file(name, device=first, epochs=1, max_steps=6, checkpoint_every=3))
        report = bench.train(bench.run_file(name, device=then, epochs=1, resume=True, checkpoint_every=3))
        bench.check(name, close(report, on_cpu) < 2e-3, close(report, on_cpu))
    if bench.device == "cuda":
        bench.check("waits that the lint does not list", *unlisted_waits(bench))


def unlisted_waits(bench: Bench) -> tuple[bool, dict[str, int]]:
    """Lines of the package where CUDA says that the host waits, less those in functions that the lint lists."""
    listed = {row["place"].removesuffix(" on a side stream").split(" ")[0] for row in json.loads(ALLOWED.read_text())}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            bench.train(bench.run_file("run_waits", epochs=1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{w.filename.split('/hmoe_rec/')[-1]}:{w.lineno}"
        for w in told
        if "synchroniz" in str(w.message) and "/hmoe_rec/" in w.filename
    )
    bench.results.add("waits by line", dict(lines.most_common(40)))
    strange = {line: n for line, n in lines.items() if f"hmoe_rec/{line.rsplit(':', 1)[0]}" not in listed and n > 5}
    return not strange, strange


def marked_tests(bench: Bench) -> None:
    """2: pytest -m gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    bench.check(
        "pytest -m gpu", done.returncode == 0, done.stdout.strip().splitlines()[-1:] + failed_lines(done.stdout)
    )


def failed_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]


def parity(bench: Bench) -> None:
    """3: every expert, number encoder and pooling, forward and backward, then every loss in a short run."""
    from parts import experts, numbers, poolings

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)
    candidates = [*experts(37, 7, 8, 12), *numbers(37, 5, 8), *poolings(37, 6, 16)]
    errors: dict[str, Any] = {}
    for candidate in candidates:
        fp32, bf16, bf16_on_cpu = part_errors(candidate, bench.device)
        errors[candidate.name] = [fp32, bf16, bf16_on_cpu]
        bench.results.add("relative errors: fp32, bf16, bf16 of the CPU", errors)
        if not (fp32 < 2e-4 and bf16 < 0.02 + 2 * bf16_on_cpu):
            bench.check(candidate.name, False, errors[candidate.name])
    for name, parts in LOSSES.items():
        if bench.is_over():
            bench.check("not reached", False, name)
            break
        options = {"losses": {"click": parts}, "epochs": 1, "max_steps": 6}
        pair = [bench.train(bench.run_file(f"loss {name} {d}", device=d, **options)) for d in ("cpu", bench.device)]
        bench.check(f"loss {name}", close(*pair) < 1e-3, close(*pair))


LOSSES: dict[str, list[Any]] = {
    "focal": ["focal"],
    "pair": ["bce", "pair"],
    "list within user": ["bce", {"kind": "list", "within": "user"}],
    "rcr": ["bce", "rcr"],
    "jrc within user": ["bce", {"kind": "jrc", "within": "user"}],
}


def part_errors(candidate: Any, device: str) -> list[float]:
    """Largest differences of outputs and gradients to the CPU's in fp32, over the largest value of each tensor."""
    inputs = candidate.inputs()
    reference = outcome(candidate.module, inputs, "cpu", False)
    found = [outcome(candidate.module, inputs, d, bf16) for d, bf16 in ((device, False), (device, True), ("cpu", True))]
    return [max(relative(a, b) for a, b in zip(tensors, reference, strict=True)) for tensors in found]


def relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-3)
    return ((found - expected).abs().max() / scale).item() if expected.numel() else 0.0


def outcome(module: torch.nn.Module, inputs: tuple[Tensor, ...], device: str, bf16: bool) -> list[Tensor]:
    """Outputs and gradients, on the CPU in fp32."""
    module = module.to(device)
    module.zero_grad()
    given = [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        outs = [x for x in tree_leaves(module(*given)) if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
    gradients = [x.grad for x in [*given, *module.parameters()] if x.grad is not None]
    kept = [x.detach().float().cpu().clone() for x in [*outs, *gradients]]
    module.to("cpu").zero_grad()
    return kept


def managed(bench: Bench) -> None:
    """4: managed ids give the rows that they give on the CPU; what is published is what the checkpoint holds."""
    from managed_ids import managed_file

    for evict in ("lru", "lfu"):
        pair = []
        for device in ("cpu", bench.device):
            content = managed_file(bench.folder, f"managed {evict} {device}", evict, device=device, epochs=1)
            content["model"]["dropout"] = 0.0
            pair.append(bench.train(content))
        bench.check(f"managed {evict} against CPU", close(*pair) < 1e-3, close(*pair))
    to = bench.folder / "published"
    content = managed_file(bench.folder, "managed published", device=bench.device, epochs=1)
    content["train"]["publish"] = {"to": str(to), "every": 3, "base_every": 2}
    bench.train(content)
    bench.check("published against checkpoint", *published_equals(bench, to, Path(content["train"]["run_dir"])))


def published_equals(bench: Bench, to: Path, run_dir: Path) -> tuple[bool, Any]:
    from hmoe_rec.serving.published import PublishedWeights
    from hmoe_rec.training.checkpoint import CheckpointManager, read_unsharded

    checkpoint = CheckpointManager(str(run_dir / "checkpoints")).latest()
    assert checkpoint is not None, "nothing was saved"
    saved = read_unsharded(checkpoint, prefix="model.model.")
    published = PublishedWeights(str(to))
    published.update()
    arrays = published.arrays
    common = [name for name in arrays if name in saved]
    worst = max(float(abs(torch.as_tensor(arrays[n]).float() - saved[n].float()).max()) for n in common)
    return bool(common) and worst == 0, {"arrays": len(common), "largest difference": worst}


def kernels(bench: Bench) -> None:
    """5: where tables lie x optimizer x precision: the best step, loaded again, scores what it scored."""
    places = ("fused", "fused_uvm", "fused_uvm_caching") if bench.device == "cuda" else ("fused",)
    for kernel in places:
        for optimizer in ("rowwise_adagrad", "adagrad", "sgd"):
            for precision in ("fp32", "fp16"):
                name = f"{kernel} {optimizer} {precision}"
                if bench.is_over():
                    bench.check("not reached", False, name)
                    return
                bench.check(name, *best_step_again(bench, name, kernel, optimizer, precision))


def best_step_again(bench: Bench, name: str, kernel: str, optimizer: str, precision: str) -> tuple[bool, Any]:
    """With rates so large that the last epoch is not the best one, `evaluate` repeats the report's metrics."""
    from hmoe_rec.training.evaluate import evaluate_run

    options = {"embedding_optimizer": optimizer, "embedding_learning_rate": 60.0 if optimizer == "sgd" else 0.5}
    best = {"metric": "logloss", "task": "like"}  # which overfits first
    content = bench.run_file(name, epochs=8, learning_rate=0.05, best=best, **options)
    content["model"]["table_precision"] = precision
    content["sharding"] = {"constraints": {"*": {"kernels": [kernel]}}}
    report = bench.train(content)
    error = close(report, {"test": evaluate_run(content["train"]["run_dir"])["metrics"]})
    figures = {"best step": report["best_step"], "steps": report["steps"], "difference": error}
    return error < 1e-6 and report["best_step"] < report["steps"], figures


def speed(bench: Bench) -> None:
    """6: examples per second by batch, precision, pinned memory and pipeline; a trace of ten steps."""
    from throughput import make_data, run_config

    make_data(bench.folder / "speed", 1 << 18 if bench.device == "cuda" else 1 << 15, 100_000)
    batches = (4096, 16384) if bench.device == "cuda" else (512,)
    cases = [(b, p, pin, "sparse_dist") for b in batches for p in ("fp32", "tf32", "bf16") for pin in (True, False)]
    cases += [(b, "bf16", True, "plain") for b in batches]
    for batch, precision, pinned, pipeline in cases:
        if bench.is_over():
            bench.check("not reached", False, f"{batch} {precision}")
            return
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        content = run_config(bench.folder / "speed", "mmoe", "bf16" if precision == "bf16" else "fp32", 8)
        content["train"] |= {"global_batch_size": batch, "device": bench.device, "pipeline": pipeline}
        name = f"batch {batch}, {precision}, {'pinned' if pinned else 'pageable'}, {pipeline}"
        bench.results.add(name, measure_steps(content, batch, pinned, bench.results.path.with_name("trace.json.gz")))


def measure_steps(content: dict[str, Any], batch_size: int, pinned: bool, trace: Path) -> dict[str, float]:
    """Batches lie in host memory before the clock runs, so that the reader is not measured."""
    from hmoe_rec.config import prepare_data, resolve_config
    from hmoe_rec.sharding.process import process_group
    from hmoe_rec.training.trainer import Trainer

    config = resolve_config(content)
    with process_group(content["train"]["device"]) as process:
        trainer = Trainer(config, prepare_data(config), process, time.perf_counter())
        trainer.sharded.train()
        trainer.optimizers.set_learning_rates(0)
        reader = trainer._batches()
        held = [
            batch.pin_memory() if pinned and process.device.type == "cuda" else batch
            for batch, _ in zip(reader, range(8), strict=False)
        ]
        feed = endless(held)
        steps(trainer, feed, 10, process.device)
        seconds = min(steps(trainer, feed, 30, process.device) for _ in range(2))
        if process.device.type == "cuda" and not trace.exists():
            write_trace(trainer, feed, process.device, trace)
        memory = torch.cuda.max_memory_allocated() / 2**30 if process.device.type == "cuda" else 0.0
    return {"examples_per_second": round(30 * batch_size / seconds), "ms_per_step": 1000 * seconds / 30, "GiB": memory}


def endless(held: list[Any]) -> Iterator[Any]:
    while True:
        yield from held


def steps(trainer: Any, feed: Iterator[Any], count: int, device: torch.device) -> float:
    """Seconds of so many steps, the device's work included."""
    began = time.perf_counter()
    for _ in range(count):
        trainer.loop.progress(feed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def write_trace(trainer: Any, feed: Iterator[Any], device: torch.device, path: Path) -> None:
    with torch.profiler.profile() as profiler:
        steps(trainer, feed, 10, device)
    profiler.export_chrome_trace(str(path))


def plans(bench: Bench) -> None:
    """7: bench plan and bench calibrate run, with their figures."""
    out = bench.results.path.parent
    words = ["bench", "calibrate", "--device", bench.device, "--world-size", "1", "--repeats", "3", "--out"]
    bench.command(*words, str(out / "calibrated.yaml"))
    bench.results.add("calibrate", "ok")
    plan = [
        "bench",
        "plan",
        "configs/benchmark.yaml",
        "--zipf",
        "0.8",
        "--plans",
        "table_wise,auto",
        "--world-size",
        "1",
    ]
    plan += ["--rounds", "2", "--topology", str(out / "calibrated.yaml"), "--json", str(out / "plans.json")]
    bench.command(*plan, f"train.device={bench.device}")
    found = json.loads((out / "plans.json").read_text())["plans"]
    kept = ("error", "median_ms", "median_ms_95", "table_ms", "examples_per_second")
    bench.results.add("plan", {p["name"]: {key: p[key] for key in kept} for p in found})


def others(bench: Bench) -> None:
    """8: a stream of files, an uncertainty fit and the analyses of a run."""
    import yaml

    content = bench.run_file("others", epochs=1)
    path = bench.folder / "others.yaml"
    path.write_text(yaml.safe_dump(content))
    bench.command("train", str(path))
    run_dir = content["train"]["run_dir"]
    for words in (["uncertainty", "fit", run_dir, "--kind", "laplace"], ["analyze", "all", run_dir]):
        began = time.perf_counter()
        bench.command(*words)
        bench.results.add(" ".join(words[:2]), round(time.perf_counter() - began, 1))
    stream = bench.folder / "stream"
    stream.mkdir()
    (bench.folder / "train.parquet").rename(stream / "0.parquet")
    followed = f"train.run_dir={bench.folder / 'followed'}"
    bench.command("train", str(path), "data.train=null", followed, "--follow", str(stream), "--until-idle", "1")
    report = json.loads((bench.folder / "followed" / "report.json").read_text())
    bench.check("followed rows", report["rows"] == 2000, report["rows"])


BLOCKS: tuple[Callable[[Bench], None], ...] = (
    doctor,
    runs,
    marked_tests,
    parity,
    managed,
    kernels,
    speed,
    plans,
    others,
)

if __name__ == "__main__":
    number, path, device, seconds = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    bench = Bench(Results(path), device, seconds)
    BLOCKS[number](bench)
    bench.results.add("finished", True)
