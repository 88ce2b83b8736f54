"""Files that survive a crash of the machine: written under another name, synced, renamed, the folder synced."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rayfm.config import CapacityError
from rayfm.snapshots.manifest import sync_dir

TEMPORARY = ".tmp-"
"""How the names of unfinished files begin; what a killed process leaves of them is swept."""


def write_durably(path: Path, write: Callable[[IO[bytes]], object], modified: float | None = None) -> int:
    """Write a file so that it stands whole, also after a power cut, once this returns; else it is not there.

    Args:
        path: its name; folders are made.
        write: fills the open file.
        modified: the modification time that it gets, in seconds since 1970; by default now.

    Returns:
        Its size in bytes.

    Raises:
        CapacityError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                if modified is not None:
                    os.utime(file.fileno(), (modified, modified))
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(temporary, path)
            sync_dir(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CapacityError(f"{path}: cannot write ({error.strerror or error}); free space or fix access") from None
    return size


def sync_file(path: Path) -> None:
    """Make a file that somebody else wrote, and its entry in the folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_dir(path.parent)
