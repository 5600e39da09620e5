"""One YAML file and overrides -> one validated, frozen `RunConfig`. The only reader of configuration.

file.py      text, overrides <-> nested dicts
sections.py  every key of a run file with type, default and meaning
online.py    those of section online
layout.py    the model section -> sets, experts, routes; options of parts against their constructors
run.py       all of it together, and all problems at once
data.py      the synthetic log of a run, made where it is missing
"""

from hmoe_rec.config.data import ResolvedData, prepare_data
from hmoe_rec.config.run import RunConfig, load_config, resolve_config

__all__ = ["ResolvedData", "RunConfig", "load_config", "prepare_data", "resolve_config"]
