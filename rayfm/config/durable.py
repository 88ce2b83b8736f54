"""Files that are whole or not there: written under another name, then renamed.

`write_whole` is safe against the death of the process. `write_durably` is also safe against the death of the machine:
it syncs the file before the rename and the folder after it, which costs a few milliseconds a file.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rayfm.config.errors import CapacityError, RayfmError

TEMPORARY = ".tmp-"
"""How the names of unfinished files begin; a killed process leaves them, and whoever owns the folder may sweep them."""

Fill = Callable[[IO[bytes]], object]
"""Writes a file's bytes into the open file."""


def write_durably(
    path: Path,
    write: Fill,
    *,
    modified: float | None = None,
    only_writer: bool = False,
    error: type[RayfmError] = CapacityError,
) -> int:
    """Write a file so that it stands whole, also after a power cut, once this returns; else the old one, or none, does.

    Args:
        path: its name; folders are made.
        write: fills the open file.
        modified: the modification time that it gets, in seconds since 1970; by default now.
        only_writer: nobody else writes this file meanwhile. The unfinished file then has one name, so the next write
            clears away what a killed one left; else somebody has to sweep (see `TEMPORARY`).
        error: the kind of error to raise.

    Returns:
        Its size in bytes.

    Raises:
        RayfmError: of the kind ``error``: the disk is full, or the folder cannot be written.
    """
    return _write(path, write, True, modified, only_writer, error)


def write_whole(path: Path, write: Fill, *, error: type[RayfmError] = CapacityError) -> int:
    """Write a file so that a reader sees the old one, the new one, or none: never a part of one.

    Nothing is synced: after a power cut the file may be empty. For what is made anew, or is noticed when it is read.

    Args:
        path: its name; folders are made.
        write: fills the open file.
        error: the kind of error to raise.

    Returns:
        Its size in bytes.

    Raises:
        RayfmError: of the kind ``error``: the disk is full, or the folder cannot be written.
    """
    return _write(path, write, False, None, False, error)


def sync_open(file: IO[bytes]) -> None:
    """Make what was written to an open file durable; its name is durable once `sync_dir` was called for the folder."""
    file.flush()
    os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file that somebody else wrote, and its entry in the folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_dir(path.parent)


def move_new(source: Path, target: Path) -> None:
    """Give a file the name ``target``, which nobody has: of several that do so at once, one does. (On a mount without
    hard links only where they do not do so at the very same moment.)

    Raises:
        FileExistsError: the name stands already.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(source, target)
        return
    source.unlink(missing_ok=True)


def _write(
    path: Path, write: Fill, durable: bool, modified: float | None, only_writer: bool, error: type[RayfmError]
) -> int:
    temporary = path.with_name(f".{path.name}.tmp" if only_writer else f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                size = file.tell()
                if modified is not None:
                    os.utime(file.fileno(), (modified, modified))
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_dir(path.parent)
    except OSError as problem:
        reason = problem.strerror or problem
        raise error(f"{path}: cannot write ({reason}); free space or fix access") from None
    return size
