"""The command line, ``emp-fast`` or ``python -m emp_fast``: one file per command.

Every user error gives one line on stderr and exit code 2.
"""

from __future__ import annotations

from typing import Annotated

import typer

import emp_fast
from emp_fast.cli.bench import bench
from emp_fast.cli.console import OneLineErrors
from emp_fast.cli.demo import demo
from emp_fast.cli.doctor import doctor
from emp_fast.cli.select import select

__all__ = ["app", "main"]

app = typer.Typer(
    cls=OneLineErrors,
    help="Fast, drop-in scoring and selection for dynamic data pruning.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
for command in (doctor, demo, bench, select):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"emp_fast {emp_fast.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Runs the command line."""
    app(prog_name="emp-fast")
