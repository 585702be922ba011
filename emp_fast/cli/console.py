"""Shared by all commands: consoles and the error line."""

from __future__ import annotations

import codecs
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from emp_fast._validation import checked_device
from emp_fast.backends import BackendError, resolve
from emp_fast.files import FileProblem

__all__ = ["InputError", "OneLineErrors", "chosen_device", "end_early", "stderr", "stdout"]

#: Width of tables in a log file, where there is no terminal that has a width.
_WIDTH_WITHOUT_TERMINAL = 120
#: What output in ASCII has in place of characters that the commands print.
_NEAREST = {"µ": "u", "±": "+-"}
_INTERRUPTED = 130  # exit code with which a shell reports SIGINT

# Some versions of typer use click, others bundle a copy of it. The base class of errors is found
# among the ancestors of typer's public error in both cases.
_UsageProblem: type[Any] = next(
    ancestor for ancestor in typer.BadParameter.__mro__ if ancestor.__name__ == "ClickException"
)


class InputError(Exception):
    """The user's input cannot be used; the message is the one line that is printed."""


class _Interrupted(Exception):
    """Ctrl-C, after what was finished has been printed; the message says how much that is."""


class OneLineErrors(TyperGroup):
    """A group of commands that ends every usage error with one line on stderr and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs like the base class; with ``standalone_mode`` it ends the process."""
        _write_any_text()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                result = super().main(
                    args, prog_name, complete_var, False, windows_expand_args, **extra
                )
        except Exception as error:
            if not standalone_mode:
                raise
            _end(error)
        if standalone_mode:
            if result == _INTERRUPTED:  # some versions of typer return this and raise no Abort
                typer.echo("emp-fast: interrupted", err=True)
            sys.exit(result if isinstance(result, int) else 0)
        return result


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        InputError: the device does not exist here, or the backend chosen by the environment cannot
            serve it.
    """
    try:
        device = checked_device(name)
    except ValueError as error:
        problem = str(error.__cause__).splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(f"--device {name!r} cannot be used: {problem}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    try:
        resolve(device)
    except (ValueError, BackendError) as error:
        raise InputError(str(error)) from error
    return device


def end_early(error: BaseException, finished: int, planned: int, what: str) -> NoReturn:
    """Ends a command that has printed what was finished before Ctrl-C or another error.

    Args:
        error: what stopped the command; anything but Ctrl-C is raised again.
        finished: how much was finished.
        planned: out of how much.
        what: the name of it, in the plural.
    """
    after = f"after {finished} of {planned} {what}"
    if isinstance(error, KeyboardInterrupt):
        raise _Interrupted(f"interrupted {after}") from error
    typer.echo(f"emp-fast: stopped {after}", err=True)
    raise error


def stdout() -> Console:
    """The console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """The console for progress and remarks, so that a redirected stdout holds only results."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_WITHOUT_TERMINAL)
    return console


def _write_any_text() -> None:
    """Makes an output that cannot hold a character get the nearest that it can."""
    codecs.register_error("emp_fast.nearest", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="emp_fast.nearest")


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """A handler of codec errors."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_NEAREST.get(character, "?") for character in text), error.end


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning in one line, without file and line number, which do not help the user."""
    typer.echo(f"emp-fast: {message}", err=True)


def _end(error: Exception) -> NoReturn:
    """Ends the process with the line and exit code of a user error; raises any other error."""
    if isinstance(error, (typer.Abort, _Interrupted)):
        typer.echo(f"emp-fast: {str(error) or 'interrupted'}", err=True)
        sys.exit(_INTERRUPTED)
    if isinstance(error, _UsageProblem):
        message = error.format_message()
    elif isinstance(error, (InputError, FileProblem, BackendError, ModuleNotFoundError)):
        message = str(error)
    elif isinstance(error, OSError):  # of a file, or of an output that takes no more
        place = "" if error.filename is None else f"{error.filename}: "
        message = f"{place}{error.strerror or error}"
    else:
        raise error
    typer.echo(f"emp-fast: {' '.join(message.split())}", err=True)
    sys.exit(2)
