"""Whether an error says that there was no room for a file, whoever raised it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gac.runs.errors import StoppedError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Of an `OSError` where a file has no room to grow: disk, quota or limit."""

_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers tell the system's number."""

_OF_TORCH = ("inline_container", "PytorchStreamWriter")
"""What torch.save says of a file that it could not write; not why."""

_PROBE = 1 << 20


@contextlib.contextmanager
def stops_without_room(folders: list[Path], then: Callable[[], str]) -> Iterator[None]:
    """Turns errors for want of room into :class:`StoppedError`, which names the file and says ``then``.

    Threads that write events die of the same want: they say nothing, as whoever gives them events is told.
    """
    real = threading.excepthook

    def hook(args: Any) -> None:
        if not isinstance(args.exc_value, OSError) or args.exc_value.errno not in NO_ROOM:
            real(args)

    threading.excepthook = hook
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch have kinds of their own
        what = no_room(error, folders)
        if what is None:
            raise
        raise StoppedError(
            f"no room left to write {what}; everything up to the last checkpoint is kept: make room and {then()}"
        ) from error
    finally:
        threading.excepthook = real


def no_room(error: BaseException, folders: list[Path]) -> str | None:
    """What had no room, and the system's reason; None where the error says something else.

    Args:
        error: as it was caught. folders: where it may have been writing. The folder of their newest file is named
            where the error names no file.
    """
    for each in _chain(error):
        told = _OF_RUST.search(str(each))
        number = each.errno if isinstance(each, OSError) else int(told.group(1)) if told else None
        if number is None and any(word in str(each) for word in _OF_TORCH):
            number = _probed(folders)
        if number in NO_ROOM:
            name, newest = getattr(each, "filename", None), _newest(folders)
            if name is None and newest is not None:  # who writes to another name first has left nothing of it
                name = f"a file in {newest.parent}"
            return f"{name or 'a file'} ({os.strerror(number)})"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _probed(folders: list[Path]) -> int | None:
    """What the system says to a file of 1 MiB in each of the folders; None: there is room."""
    for folder in filter(Path.is_dir, folders):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error.errno
    return None


def _newest(folders: list[Path]) -> Path | None:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
