"""One process at a time that writes to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rayfm.config import DataError

LOCK = ".prepare.lock"

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def prepare_lock(root: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the store at ``root`` for the time of a prepare, as `alone` does."""
    return alone(root / LOCK, "preparing this example store", "root")


@contextlib.contextmanager
def alone(path: Path, doing: str, place: str = "folder") -> Iterator[None]:
    """Hold the lock at ``path`` for the time of the block.

    The lock is the operating system's (``flock``): it goes with the process that holds it, however that ends, so that
    a killed run is simply run again. The file stays, and says who held it last. On a mount without locks nothing is
    held.

    Args:
        path: the lock's file; its folder is there.
        doing: what the holder does, for the message.
        place: what another one may choose instead.

    Raises:
        DataError: another process holds it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DataError(
                f"{path.parent}: {holder} is {doing}; wait until it is done, or choose another {place}"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield  # closing the file lets the lock go
