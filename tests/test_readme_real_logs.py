"""The README's commands on real logs; a file of its own, so that they run beside the others."""

import pytest
from test_readme import clone as clone
from test_readme import needs_real_logs, ours, run_all


@pytest.mark.slow
@pytest.mark.data
def test_commands_on_real_logs(clone, data_dir):
    (clone / "KuaiRand-Pure").symlink_to(data_dir / "kuairand_pure")
    (clone / "census-income").symlink_to(data_dir / "census_income_kdd")
    (clone / "criteo").symlink_to(data_dir / "criteo_dac80k")
    (clone / "ml-1m").symlink_to(data_dir / "ml1m_order")
    (clone / "data" / "kuairand").mkdir(parents=True, exist_ok=True)
    for vectors in (data_dir / "kuairand_pure").glob("item_embeddings_*.parquet"):
        (clone / "data" / "kuairand" / vectors.name).symlink_to(vectors)
    chosen = [c for c in ours() if needs_real_logs(c)]
    assert len(chosen) >= 5
    run_all(chosen, clone)
