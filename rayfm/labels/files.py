"""The files of a label store, in a folder or below a prefix of a bucket: data files, which never change under their
name, and histories, which are replaced whole.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.config import LabelError
from rayfm.config.durable import write_durably

KEPT_FOOTER_BYTES = 32 << 20
"""Footers of data files that stay in memory: a compacted file is opened for each of its lanes."""

PROBE = ".rayfm-probe"


class Files(Protocol):
    """Files below a folder or URL, by their paths relative to it."""

    place: str
    """The folder or URL."""

    def write(self, path: str, write: Callable[[Any], None]) -> tuple[int, int]:
        """Make a data file, durably: ``write`` is given a binary file. Nothing reads it before a commit names it.

        Returns:
            Its size in bytes and its modification time in milliseconds since 1970.

        Raises:
            LabelError: the storage refuses.
        """
        ...

    def open(self, path: str) -> pq.ParquetFile:
        """A data file, to read. Raises OSError or ArrowInvalid where it is missing or corrupt."""
        ...

    def put(self, path: str, write: Callable[[Any], None]) -> None:
        """Make or replace a file, durably and at once: who reads finds the one before, or all of this one.

        Raises:
            LabelError: the storage refuses; then the one before stands, if there was one.
        """
        ...

    def read(self, path: str) -> pa.NativeFile:
        """A file that may have been replaced, to read. Raises FileNotFoundError or another OSError."""
        ...

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file, None where it does not exist. Raises OSError where the storage cannot be asked."""
        ...

    def stand(self) -> bool:
        """Whether there is any file. Raises LabelError where the storage cannot be asked."""
        ...

    def clear(self) -> None:
        """Delete all files. Raises LabelError where the storage refuses."""
        ...

    def check_access(self) -> None:
        """Write a file and delete it. Raises LabelError where the storage refuses."""
        ...


class _Footers:
    """The newest footers. Files never change under their name, so a footer that was read stays right."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def open(self, path: str, source: Any, **how: Any) -> pq.ParquetFile:
        with self._lock:
            known = self._kept.get(path)
        file = pq.ParquetFile(source, metadata=known, **how)
        with self._lock:
            if path not in self._kept:
                self._kept[path] = file.metadata
                self._bytes += file.metadata.serialized_size
            self._kept.move_to_end(path)
            while self._bytes > KEPT_FOOTER_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].serialized_size
        return file


class LocalFiles:
    """Files in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.place, self._footers = Path(folder), str(folder), _Footers()

    def write(self, path: str, write: Callable[[Any], None]) -> tuple[int, int]:
        whole = self.folder / path
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            try:
                with whole.open("xb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                whole.unlink(missing_ok=True)  # what a kill leaves instead is vacuumed
                raise
            status = whole.stat()
        except OSError as error:
            raise _cannot_write(whole, error) from None
        return status.st_size, int(status.st_mtime * 1000)

    def put(self, path: str, write: Callable[[Any], None]) -> None:
        # Twins of a label job may write one file at once; what a killed one leaves goes when the run is cleared.
        write_durably(self.folder / path, write, error=LabelError)

    def read(self, path: str) -> pa.NativeFile:
        return pa.OSFile(str(self.folder / path))

    def open(self, path: str) -> pq.ParquetFile:
        return self._footers.open(path, str(self.folder / path))

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        return [self._size(self.folder / path) for path in paths]

    def stand(self) -> bool:
        return any(path.is_file() for path in self.folder.rglob("*"))

    def clear(self) -> None:
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
        except OSError as error:
            raise LabelError(f"{self.folder}: cannot delete ({error.strerror or error}); fix access") from None

    def check_access(self) -> None:
        self.put(PROBE, lambda file: None)
        (self.folder / PROBE).unlink(missing_ok=True)

    @staticmethod
    def _size(path: Path) -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None


def _cannot_write(path: Path, error: OSError) -> LabelError:
    return LabelError(f"{path}: cannot write ({error.strerror or error}); free space or fix access")


class S3Files:
    """Files below a prefix of a bucket.

    Args:
        place: ``s3://bucket/prefix``.
        system: Arrow's S3 file system.
    """

    def __init__(self, place: str, system: Any) -> None:
        self.place, self._system, self._footers = place, system, _Footers()

    def _key(self, path: str) -> str:
        return f"{self.place.removeprefix('s3://')}/{path}"

    def write(self, path: str, write: Callable[[Any], None]) -> tuple[int, int]:
        try:
            with self._system.open_output_stream(self._key(path)) as file:  # visible once it is closed
                write(file)
            info = self._system.get_file_info(self._key(path))
        except OSError as error:
            raise self._refused(path, "cannot write", error) from None
        return info.size, int(info.mtime_ns // 1_000_000)

    def open(self, path: str) -> pq.ParquetFile:
        # pre_buffer reads the columns of a row group in few requests.
        return self._footers.open(path, self._system.open_input_file(self._key(path)), pre_buffer=True)

    def put(self, path: str, write: Callable[[Any], None]) -> None:
        # Whole before the upload begins: a stream that an error leaves is closed, and what is closed stands.
        sink = pa.BufferOutputStream()
        write(sink)
        content = sink.getvalue()
        try:
            with self._system.open_output_stream(self._key(path)) as file:
                file.write(content)
        except OSError as error:
            raise self._refused(path, "cannot write", error) from None

    def read(self, path: str) -> pa.NativeFile:
        file: pa.NativeFile = self._system.open_input_file(self._key(path))
        return file

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        if not paths:
            return []
        found = self._system.get_file_info([self._key(path) for path in paths])
        return [info.size if info.is_file else None for info in found]

    def stand(self) -> bool:
        try:
            return self._any()
        except OSError as error:
            raise self._refused("", "cannot list", error) from None

    def _any(self) -> bool:
        from pyarrow.fs import FileSelector

        # Lists what is below "<prefix>/", so a neighbour whose name begins alike is not meant.
        return bool(self._system.get_file_info(FileSelector(self._key("").rstrip("/"), allow_not_found=True)))

    def clear(self) -> None:
        try:
            if self._any():
                self._system.delete_dir(self._key("").rstrip("/"))
        except OSError as error:
            raise self._refused("", "cannot delete", error) from None

    def check_access(self) -> None:
        self.put(PROBE, lambda file: None)
        try:
            self._system.delete_file(self._key(PROBE))
        except OSError as error:
            raise self._refused(PROBE, "cannot delete", error) from None

    def _refused(self, path: str, what: str, error: OSError) -> LabelError:
        where = f"{self.place}/{path}".rstrip("/")
        return LabelError(f"{where}: {what} ({one_line(error)}); check bucket, endpoint and keys")


def one_line(error: object) -> str:
    """An error's message without colours, line breaks and XML, at most 300 characters: clients of S3 write pages."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    code = re.search(r"<Code>(\w+)</Code>", text)
    text = re.sub(r"<\?xml.*", f"({code.group(1)})" if code else "", text, flags=re.DOTALL)
    text = " ".join(text.replace("↳", " ").split())
    return text if len(text) <= 300 else text[:297] + "..."
