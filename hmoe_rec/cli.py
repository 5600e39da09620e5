"""The command line: hmoe-rec train | evaluate | predict | show | plan | bench | checkpoint | ...

Commands import what they need when they run: `--help` loads neither torch nor pydantic. A mistake of the user's ends
with one message and exit code 2; HMOE_REC_TRACEBACK=1 shows where it was found. Of several processes, the first speaks.
"""

import os
import sys
from typing import Any

import typer

from hmoe_rec.commands import analyze, bench, checkpoints, data, explore, plans, publish, runs, uncertainty
from hmoe_rec.commands.common import is_first

# Environment of the libraries; takes effect if set before they are loaded.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take the cores from the ones that read data
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # after a restart torchrun's store still has the keys of dead processes
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

app = typer.Typer(
    name="hmoe-rec",
    help="Trains, evaluates and serves heterogeneous mixtures of experts with multi-embedding, on TorchRec.\n\n"
    "Start with `hmoe-rec train configs/quickstart.yaml`; it makes its own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.registered_commands += runs.app.registered_commands
groups = {
    **{"data": data, "plan": plans, "bench": bench, "checkpoint": checkpoints},
    **{"publish": publish, "analyze": analyze, "uncertainty": uncertainty, "explore": explore},
}
for name, commands in groups.items():
    app.add_typer(commands.app, name=name)


def main(arguments: list[str] | None = None) -> None:
    """The program. Exit codes: 0 done, 1 it failed, 2 a mistake in what was given, 130 interrupted."""
    from hmoe_rec.types import HmoeError

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app(arguments)
    except (HmoeError, OSError) as error:
        if os.environ.get("HMOE_REC_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        _print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        _print_error("interrupted")
        sys.exit(130)


def _print_error(error: Any) -> None:
    """Of mistakes that every process finds, the first process tells; of others, the one that found it."""
    from hmoe_rec.types import ConfigError, LockError, PlanError, SchemaError

    if isinstance(error, ConfigError | SchemaError | PlanError | LockError | str) and not is_first():
        return
    where = "" if is_first() else f" (process {os.environ['RANK']})"
    print(f"hmoe-rec: error{where}: {error}", file=sys.stderr)
