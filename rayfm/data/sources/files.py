"""Opening the files of a log, wherever they are, with errors that name them."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayfm.config import DataError

NULLS = ["", "nan", "NaN", "NULL", "null", "None"]
"""How logs write a missing value."""


def list_files(path: str, expand: bool = True, suffix: str = ".parquet") -> tuple[pafs.FileSystem, list[str]]:
    """The filesystem of ``path`` and the files it stands for, sorted by path.

    Args:
        path: a file, a folder (with its sub-folders) or a glob; local or a pyarrow filesystem URI.
        expand: whether to list the files; without, the list is empty.
        suffix: of the files that a folder stands for; names that begin with ``.`` or ``_`` are passed over.

    Raises:
        DataError: nothing is there, or the filesystem cannot be reached.
    """
    fixed, pattern = _split_glob(path)
    try:
        if "://" in path:
            filesystem, base = pafs.FileSystem.from_uri(fixed)
        else:
            filesystem, base = pafs.LocalFileSystem(), str(Path(fixed).expanduser().absolute())
        if not expand:
            return filesystem, []
        info = filesystem.get_file_info(base)
        if info.type == pafs.FileType.File and not pattern:
            return filesystem, [base]
        if info.type != pafs.FileType.Directory:
            raise DataError(f"{path}: no such file or folder; check the source's path")
        entries = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be listed ({error}); check the source's path") from None
    files = [entry.path for entry in entries if entry.type == pafs.FileType.File]
    if pattern:
        depth = pattern.count("/")
        files = [
            file
            for file in files
            if _matches(file[len(base) :].lstrip("/"), pattern, anywhere="**" in pattern, depth=depth)
        ]
    else:
        files = [
            file
            for file in files
            if file.endswith(suffix) and not any(part[:1] in "._" for part in file[len(base) :].strip("/").split("/"))
        ]
    if not files:
        raise DataError(f"{path}: no {suffix} file matches; check the source's path")
    return filesystem, sorted(files)


def _split_glob(path: str) -> tuple[str, str]:
    """The part of a path before its first wildcard folder, and the pattern after it ('' without wildcards)."""
    parts = path.split("/")
    for position, part in enumerate(parts):
        if any(sign in part for sign in "*?["):
            return "/".join(parts[:position]) or ("/" if path.startswith("/") else "."), "/".join(parts[position:])
    return path, ""


def _matches(name: str, pattern: str, anywhere: bool, depth: int) -> bool:
    if anywhere:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*")) or fnmatch.fnmatchcase(
            name, pattern.replace("**/", "")
        )
    return name.count("/") == depth and fnmatch.fnmatchcase(name, pattern)


@contextlib.contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Name the file in what Arrow says about corrupt bytes."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        reason = first_line(error)
        raise DataError(f"{path}: corrupt or unreadable Parquet file ({reason}); replace it or leave it out") from None


@contextlib.contextmanager
def text_errors(path: str) -> Iterator[None]:
    """Name the file in what Arrow says about bad CSV or JSON."""
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); correct or replace the file") from None


def first_line(error: Exception) -> str:
    """What an error says, without the lines that Arrow adds below."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def open_parquet(filesystem: pafs.FileSystem, path: str) -> pq.ParquetFile:
    """A Parquet file, ready to read by row group.

    Raises:
        DataError: it is missing or no Parquet file.
    """
    with parquet_errors(path):
        return pq.ParquetFile(path, filesystem=filesystem)
