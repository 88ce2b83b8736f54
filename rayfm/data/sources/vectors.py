"""Feature vectors by id, from files too large for a task's memory."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfm.config import DataError
from rayfm.data.sources.files import text_errors
from rayfm.data.staging import disk_errors

CHUNK_ROWS = 65_536
SUFFIXES = (".npy", ".h5")

Float32 = npt.NDArray[np.float32]


def find_vectors(folder: Path, stem: str, advice: str) -> Path:
    """The file called ``stem`` as ``.npy`` or ``.h5``.

    Raises:
        DataError: it is missing.
    """
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(f"{folder}: {stem}.h5 (or .npy) is missing; {advice}")


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors ``[I, D]`` of the ids 0, 1, ... I - 1 in a NumPy file, which is mapped, not loaded."""

    path: Path
    dim: int

    @classmethod
    def open(cls, path: Path, folder: Path) -> Vectors:
        """From ``.npy``, or from ``.h5`` with ``key`` (0, 1, ...) and ``value``, which is copied to ``folder``.

        Raises:
            DataError: the file is unreadable or of another form, or ``h5py`` is not installed.
            CapacityError: the disk is full.
        """
        if path.suffix == ".h5":
            path = _unpack(path, folder)
        shape = _load(path).shape
        return cls(path, shape[1])

    def take(self, ids: npt.NDArray[np.int64]) -> Float32:
        """Vectors ``[N, D]`` of ids ``[N]``; NaN for an id without one."""
        whole = _load(self.path)
        found = (ids >= 0) & (ids < len(whole))
        taken = np.full((len(ids), self.dim), np.nan, np.float32)
        taken[found] = whole[ids[found]]
        return taken


def _load(path: Path) -> npt.NDArray[Any]:
    try:
        with text_errors(str(path)):
            whole = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}); replace the file") from None
    if whole.ndim != 2 or whole.dtype.kind != "f":
        raise DataError(f"{path}: {whole.dtype} {list(whole.shape)}, floating-point [ids, dimensions] is wanted")
    return np.asarray(whole)


def _unpack(path: Path, folder: Path) -> Path:
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError:
        raise DataError(
            f"{path}: h5py is needed to read it; `pip install h5py`, or save its `value` as {path.stem}.npy beside it"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.stem}.npy"
    try:
        with text_errors(str(path)), h5py.File(path, "r") as file:
            keys, values = file["key"], file["value"]
            if values.ndim != 2 or keys.shape != values.shape[:1]:
                raise DataError(f"{path}: key {list(keys.shape)} and value {list(values.shape)} do not fit together")
            with disk_errors(folder):
                copy = np.lib.format.open_memmap(target, "w+", np.float32, values.shape)
                for start in range(0, len(keys), CHUNK_ROWS):
                    own = np.asarray(keys[start : start + CHUNK_ROWS])
                    if not np.array_equal(own, np.arange(start, start + len(own))):
                        raise DataError(f"{path}: the keys do not count 0, 1, ... as those of KuaiVideo_x1 do")
                    copy[start : start + len(own)] = values[start : start + len(own)]
                copy.flush()
    except KeyError:
        raise DataError(f"{path}: the data sets 'key' and 'value' are wanted, as in KuaiVideo_x1") from None
    return target
