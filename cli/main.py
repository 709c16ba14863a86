"""The command `mhc-tune`: its sub-commands, and what it does with errors.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

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
    """Turns an error that the user can mend into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Run a sub-command; `BadInput` and wrong usage exit with code 2."""
        try:
            return super().invoke(ctx)
        except BadInput as error:
            message = str(error)
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
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fused kernels for manifold-constrained hyper-connections (mHC), tuned for your device.

    A first run:  mhc-tune doctor, then  mhc-tune tune --width 1280 --tokens 2048,
    then  mhc-tune export kernels.mhcpack, and in your training code  mhc.load_kernels("kernels.mhcpack").""",
)
app.command("tune")(tune.tune)
app.command("export")(packs.export)
app.command("import")(packs.import_)
app.command("inspect")(packs.inspect)
app.command("merge")(merge.merge)
app.command("diff")(diff.diff)
app.command("keys")(keys.keys)
app.command("verify")(verify.verify)
app.command("explain")(explain.explain)
app.command("prune")(prune.prune)
app.command("report")(report.report)
app.command("record")(record.record)
app.command("replay")(replay.replay)
app.command("bench")(bench.bench)
app.command("gpu")(gpu.gpu)
app.command("doctor")(doctor.doctor)
app.command("compile")(compile.compile_)

if __name__ == "__main__":
    app()
