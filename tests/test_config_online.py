"""Section `online` of a run file: what it needs, what it forbids, and that it is not shown where it is not used."""

import pytest
import yaml

from hmoe_rec.config import resolve_config
from hmoe_rec.types import ConfigError

RUN_FILE = {
    "data": {"schema": {"ids": [{"name": "user", "num_embeddings": 7}], "tasks": [{"name": "click"}]}},
    "model": {"preset": "single", "expert": {"kind": "flat_dnn", "hidden": [5]}},
}


def problems(**sections: dict) -> str:
    with pytest.raises(ConfigError) as error:
        resolve_config(RUN_FILE | sections)
    return str(error.value)


def test_a_followed_source_stands_in_for_training_data():
    config = resolve_config(RUN_FILE | {"online": {"follow": "s3://bucket/log", "alarms": {"stop_after": 3}}})
    assert (config.online.window_rows, config.online.alarms.stop_after) == (65536, 3)
    assert resolve_config(yaml.safe_load(config.to_yaml())) == config
    assert "data.train: missing" in problems()


def test_the_section_is_not_shown_where_it_is_not_used():
    config = resolve_config(RUN_FILE | {"data": RUN_FILE["data"] | {"train": "x.parquet"}})
    assert "online" not in config.to_dict() and "checkpoint_windows" not in config.to_yaml()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"online": {"follow": "x", "order": "time"}}, "online.order: time needs the schema's time column"),
        ({"online": {"follow": "x", "order": "tim"}}, "online.order: .*'name' or 'time'"),
        ({"online": {"follow": "x", "late": "trian"}}, "did you mean 'train'"),
        ({"online": {"follow": "x", "sketch_bits": 3000}}, "sketch_bits: expected a power of two, got 3000"),
        ({"online": {"folow": "x"}}, "online.folow: unknown key; did you mean 'follow'"),
        ({"online": {"follow": "x"}, "train": {"decay": "linear"}}, "train.decay: linear needs a last step"),
        (
            {"online": {"follow": "x"}, "sharding": {"measure_pooling": True}},
            "measure_pooling: needs data.train beside",
        ),
        ({"online": {"follow": "x"}, "train": {"early_stop": {}}}, "train.early_stop: not with online.follow"),
    ],
)
def test_what_does_not_go_is_told(sections, message):
    import re

    assert re.search(message, problems(**sections)), problems(**sections)


def test_rows_of_a_stream_are_not_sampled():
    data = RUN_FILE["data"] | {"sampling": {"negatives": 0.5}}
    assert "data.sampling: not with online.follow" in problems(data=data, online={"follow": "x"})
