"""Files that are either whole or not there, and files of a state, which are checked before anything of them is used."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import torch

from gac.state import Entry


class DamagedFile(ValueError):
    """A file that does not hold what it should: cut short, of another program, or altered. The message names it."""


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file of which, after a kill or a full disk at any moment, the old or the new one is there, whole.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    path = os.fspath(path)
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or path  # a write names no file
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    _sync(os.path.dirname(path) or ".")


def save_whole(value: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` as :func:`write_whole`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_whole(path, buffer.getvalue())


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Waits until everything in a folder, whoever wrote it, is on the disk: before a file that says it is complete.

    Raises:
        OSError: it cannot be written out.
    """
    for place, _, names in os.walk(os.fspath(folder)):
        for name in names:
            _sync(os.path.join(place, name))
        _sync(place)


def _sync(path: str) -> None:
    """One file or folder; where the system has no such thing for folders, nothing."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        if os.path.isdir(path):
            return
        raise
    try:
        with contextlib.suppress(*([OSError] if os.path.isdir(path) else [])):
            os.fsync(file)
    finally:
        os.close(file)


def load_state(path: str | os.PathLike[str], entry: Entry, *, then: str) -> Any:
    """The value of a file that ``torch.save`` wrote, once all of it is as ``entry`` says. No code in it is run.

    Args:
        path: of the file.
        entry: what it may hold.
        then: what to do where it holds something else.

    Returns:
        What ``entry`` makes of it, on the devices that it names.

    Raises:
        DamagedFile: the file cannot be read, holds objects other than tensors, numbers, text, lists and dictionaries,
            or something else than ``entry`` says. The message names the file, the place in it, and ends in ``then``.
    """
    path = os.fspath(path)
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever bytes make of the reader
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "weights_only" in str(error):  # torch advises to read it all the same
            reason = "it holds objects that are no plain data and could run code, or it is no file of torch.save"
        raise DamagedFile(f"{path} cannot be read ({reason}); {then}") from None
    try:
        return entry.read(value, path)
    except (TypeError, ValueError) as error:
        raise DamagedFile(f"{error}; {then}") from None
