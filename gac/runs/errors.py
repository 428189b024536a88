"""What ends a command with one line instead of a traceback."""

import contextlib
from collections.abc import Iterator


class UsageError(Exception):
    """A mistake of the user: printed as one line, exit code 2."""


class StoppedError(Exception):
    """A run that nobody's mistake has stopped, and that can go on: printed as one line, exit code 1."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns the errors by which the library rejects a value into `UsageError`."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
