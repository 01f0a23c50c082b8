"""The commands, and how mistakes are told. Heavy imports happen in the commands, so that `--help` is quick."""

import sys

import typer

from hf_dflop.cli.plan import plan
from hf_dflop.cli.profile import merge, profile
from hf_dflop.cli.simulate import simulate
from hf_dflop.errors import DflopError

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-dflop",
    help="Find out what a dataset costs a vision-language model, and keep ranks from waiting for each other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(profile)
app.command()(merge)
app.command()(plan)
app.command()(simulate)


@app.callback()
def _root() -> None:
    """Find out what a dataset costs a vision-language model, and keep ranks from waiting for each other."""


def main() -> None:
    """Entry point: exit code 2 and one line for a user's mistake."""
    try:
        app()
    except DflopError as error:
        print(f"hf-dflop: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
