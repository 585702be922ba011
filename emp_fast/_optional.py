"""Optional dependencies, each imported where it is needed, with one error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs"]


@contextmanager
def needs(user: str, library: str, *, extra: str, module: str | None = None) -> Iterator[None]:
    """Says what to install if the library that the block imports is not there.

        with needs("a plot", "matplotlib", extra="plot"):
            from matplotlib.figure import Figure

    Args:
        user: what needs the library, for the message.
        library: name under which it is installed.
        extra: the extra of emp_fast that includes it.
        module: name under which it is imported, if that is another.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != (module or library):
            raise  # the library is there, but not what it needs itself
        raise ModuleNotFoundError(
            f"{user} needs {library}, which is not installed: pip install 'emp_fast[{extra}]'",
            name=error.name,
        ) from error
