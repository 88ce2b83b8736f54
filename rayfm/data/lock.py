"""One preparing process per example store."""

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


@contextlib.contextmanager
def prepare_lock(root: Path) -> Iterator[None]:
    """Hold the store at ``root`` for the time of a prepare.

    The lock is the operating system's (``flock``): it goes with the process that holds it, however that ends, so that
    a killed run is simply run again. The file stays, and says who held it last. On a mount without locks nothing is
    held.

    Raises:
        DataError: another process is preparing the store.
    """
    path = root / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DataError(
                f"{root}: {holder} is preparing this example store; wait until it is done, or choose another root"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield  # closing the file lets the lock go
