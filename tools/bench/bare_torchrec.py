"""The same job without us: Parquet -> KeyedJaggedTensor -> sharded EmbeddingBagCollection -> experts -> towers.

python tools/bench/bare_torchrec.py mmoe|ple|stem DATA THREADS dmp STEPS          (called by throughput.py)
"""

import json
import os
import statistics
import sys
import time

MODEL, DATA, THREADS, STEPS = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[5])
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
BEGAN = time.perf_counter()

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor  # noqa: E402
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder  # noqa: E402
from torchrec.distributed.model_parallel import DistributedModelParallel  # noqa: E402
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology  # noqa: E402
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward  # noqa: E402
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad  # noqa: E402

META = json.load(open(f"{DATA}/meta.json"))
FIELDS, BATCH, DIM = [f"c{i:02d}" for i in range(META["F"])], 4096, 16
SETS = 3 if MODEL == "stem" else 1


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(m for i, o in zip(widths, widths[1:], strict=False) for m in (nn.Linear(i, o), nn.ReLU())))


class Bare(nn.Module):
    """Experts 0, 1 are shared, 2 and 3 belong to the tasks (MMoE: all shared)."""

    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        width = len(FIELDS) * DIM
        self.tables = tables
        self.experts = nn.ModuleList(mlp(width, 256, 128) for _ in range(4))
        self.gates = nn.ModuleList(nn.Linear(width, 3 if MODEL == "ple" else 4) for _ in range(2))
        self.towers = nn.ModuleList(nn.Sequential(mlp(128, 64), nn.Linear(64, 1)) for _ in range(2))

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        sets = self.tables(ids).values().view(-1, SETS, len(FIELDS) * DIM).unbind(1)
        shared = sets[-1]
        owned = sets[:2] if MODEL == "stem" else (shared, shared)
        h = [self.experts[0](shared), self.experts[1](shared), self.experts[2](owned[0]), self.experts[3](owned[1])]
        logits = []
        for t in range(2):
            if MODEL == "ple":
                seen = [h[0], h[1], h[2 + t]]
            else:
                seen = h[:2] + [h[2 + k] if MODEL == "mmoe" or k == t else h[2 + k].detach() for k in range(2)]
            gate = self.gates[t](owned[t] + shared if MODEL == "stem" else shared).softmax(-1).unsqueeze(1)
            logits.append(self.towers[t]((gate @ torch.stack(seen, 1)).squeeze(1)))
        return torch.cat(logits, 1)


def batches():
    file = pq.ParquetFile(f"{DATA}/train.parquet")
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        ids = torch.from_numpy(np.stack([table.column(f).to_numpy() for f in FIELDS]))
        labels = torch.from_numpy(np.stack([table.column(t).to_numpy() for t in ("click", "conv")], 1))
        for start in range(0, ids.shape[1], BATCH):
            values = ids[:, start : start + BATCH].contiguous()
            ones = torch.ones(values.numel(), dtype=torch.int32)
            yield KeyedJaggedTensor(FIELDS, values.view(-1), lengths=ones), labels[start : start + BATCH]


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    dist.init_process_group("gloo")
    tables = [
        EmbeddingBagConfig(name=f"t{s}_{f}", num_embeddings=META["vocab"], embedding_dim=DIM, feature_names=[f])
        for s in range(SETS)
        for f in FIELDS
    ]
    model = Bare(EmbeddingBagCollection(tables, device=torch.device("meta")))
    apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), {"lr": 0.05})
    sharders = [EmbeddingBagCollectionSharder()]
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"))
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    dense = torch.optim.Adam([p for n, p in model.named_parameters() if ".tables." not in n], 1e-3)
    wall, cpu = [], []
    for ids, labels in batches():
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
        dense.zero_grad()
        loss.backward()
        dense.step()
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        if len(wall) == STEPS:
            break
    rates = [[10 * BATCH / (x[i + 10] - x[i]) for i in range(0, len(x) - 10, 10)] for x in (wall, cpu)]
    result = {
        "first_step_s": wall[0] - BEGAN,
        "rows_s_best": max(rates[0]),
        "rows_s_median": statistics.median(rates[0]),
    }
    result |= {"rows_per_cpu_s_best": max(rates[1]), "rows_per_cpu_s_median": statistics.median(rates[1])}
    print(json.dumps(result | {"loss": loss.item()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
