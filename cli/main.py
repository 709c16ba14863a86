"""The command `mhc-tune`: its sub-commands and error handling.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from cli.bench import command as bench
from cli.commands import compile, diff, doctor, explain, keys, merge, packs, prune, record, replay, tune, verify
from cli.gpu import command as gpu
from cli.report import command as report
from cli.ui.output import say
from tiles.errors import BadInput

USAGE = 2


class Commands(TyperGroup):
    """A command group that prints errors of the user's input as one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Run a sub-command; `BadInput`, wrong usage and files that the system refuses exit with code 2."""
        try:
            return super().invoke(ctx)
        except BadInput as error:
            message = str(error)
        except OSError as error:
            if error.filename is None:  # not about a file that the user named
                raise
            message = f"{error.filename} must be usable, got {error.strerror}: mend that, or choose another"
        except typer.TyperException as error:
            if error.exit_code != USAGE:
                raise
            command = " ".join(filter(None, ("mhc-tune", ctx.invoked_subcommand, "--help")))
            message = f"{error.format_message().rstrip('.')}: see {command}"
        say(f"error: {' '.join(message.split())}")
        raise typer.Exit(USAGE)


app = typer.Typer(
    cls=Commands,
    name="mhc-tune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a docstring's paragraph
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Tune fused kernels for manifold-constrained hyper-connections (mHC) on your device.

    A first run: `mhc-tune doctor`, then `mhc-tune tune --width 1280 --tokens 2048`, then `mhc-tune export
    kernels.mhcpack`, and in your training code `mhc.load_kernels("kernels.mhcpack")`.""",
)
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Tuning": {"doctor": doctor.doctor, "tune": tune.tune, "report": report.report, "compile": compile.compile_},
    "Kernel caches and packs": {
        "export": packs.export,
        "import": packs.import_,
        "inspect": packs.inspect,
        "verify": verify.verify,
        "explain": explain.explain,
        "merge": merge.merge,
        "diff": diff.diff,
        "prune": prune.prune,
        "keys": keys.keys,
    },
    "Measuring": {"bench": bench.bench, "gpu": gpu.gpu, "record": record.record, "replay": replay.replay},
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)

if __name__ == "__main__":
    app()
