"""Where a label store lies: a folder, or a prefix of a bucket behind the S3 API.

Delta Lake reads and writes the table's log with its own client; data files are read and written here, on a folder with
plain files and on S3 with Arrow's file system. Both clients get the same endpoint, region and keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow.parquet as pq
from pydantic import SecretStr, field_validator, model_validator

from rayfm.config import Config, ConfigError, LabelError, validate

FOLDER = "labels"
"""The table's folder below the root."""

KEPT_FOOTER_BYTES = 32 << 20
"""Footers of data files that stay in memory: a compacted file is opened for each of its lanes."""

_S3 = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/?#\s]+)*/?")
_OPTIONS = ("endpoint", "region", "access_key_id", "secret_access_key", "session_token")


class Storage(Config):
    """Where the labels lie, and how to reach a bucket.

    What is not given comes from the usual environment variables, read in the process that opens the store, so that
    keys need not travel: ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or ``AWS_DEFAULT_REGION``,
    ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``; without keys, from the machine's role.
    """

    root: str
    """A local or mounted folder, or ``s3://bucket/prefix``. The table is the folder ``labels`` in it."""
    endpoint: str | None = None
    """URL of an S3-compatible service, such as ``http://minio:9000``; by default AWS's own."""
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        scheme, separator, _ = root.partition("://")
        if separator and scheme != "s3":
            raise ValueError(f"{scheme!r} is no storage; give a folder or s3://bucket/prefix")
        if separator and not _S3.fullmatch(root):
            raise ValueError("is not s3://bucket/prefix; correct it")
        return root

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
            raise ValueError("is not an http or https URL, such as http://minio:9000")
        return endpoint

    @model_validator(mode="after")
    def _check_options(self) -> Storage:
        # ConfigErrors, not ValueErrors: those are reported with all the values, and some of these are secret.
        given = [name for name in _OPTIONS if getattr(self, name) is not None]
        if self.local and given:
            raise ConfigError(f"label store: {given[0]!r} is for s3:// roots; the root is the folder {self.root!r}")
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ConfigError(
                "label store: give access_key_id and secret_access_key together, or neither for the environment's"
            )
        return self

    @classmethod
    def of(cls, root: str | Path | Storage) -> Storage:
        """A root with what the environment says.

        Raises:
            ConfigError: the root is no folder and no ``s3://bucket/prefix``.
        """
        return root if isinstance(root, Storage) else validate(cls, {"root": str(root)}, "label store")

    @property
    def local(self) -> bool:
        """Whether the root is a folder."""
        return not self.root.startswith("s3://")

    @property
    def table(self) -> str:
        """The table's folder or URL."""
        return str(Path(self.root) / FOLDER) if self.local else f"{self.root.rstrip('/')}/{FOLDER}"

    def delta_options(self) -> dict[str, str] | None:
        """What Delta Lake's client needs; None for a folder.

        A commit creates the log's next entry only if there is none (``If-None-Match: *``), so that of two writers one
        wins. A service without conditional writes must not hold a store that several processes write.
        """
        if self.local:
            return None
        reach = _Reach.of(self)
        options = {"aws_conditional_put": "etag", "aws_region": reach.region, "aws_endpoint": reach.endpoint}
        options |= {"aws_access_key_id": reach.access_key_id, "aws_secret_access_key": reach.secret_access_key}
        options |= {"aws_session_token": reach.session_token}
        if reach.endpoint is not None and reach.endpoint.startswith("http://"):
            options["aws_allow_http"] = "true"
        return {name: value for name, value in options.items() if value is not None}

    def files(self) -> Files:
        """The table's data files.

        Raises:
            ConfigError: this build of Arrow has no S3.
        """
        return LocalFiles(self.table) if self.local else S3Files(self)


@dataclasses.dataclass(frozen=True, repr=False)
class _Reach:
    """A bucket's coordinates: what the config gives, else what the environment does. Not printed: it has keys."""

    endpoint: str | None
    region: str | None
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None

    @classmethod
    def of(cls, storage: Storage) -> _Reach:
        env = os.environ
        endpoint = storage.endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        region = storage.region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
        if region is None and endpoint is not None:
            region = "us-east-1"  # services of one place ignore it, and signatures need one
        secrets = (storage.access_key_id, storage.secret_access_key, storage.session_token)
        keys = [None if secret is None else secret.get_secret_value() for secret in secrets]
        if keys[0] is None:  # keys of two origins would not fit one another
            keys = [env.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")]
        if keys[0] is None or keys[1] is None:
            keys = [None, None, None]
        return cls(endpoint, region, *keys)


class Files(Protocol):
    """Immutable data files, by their paths relative to the table."""

    def write(self, path: str, write: Callable[[Any], None]) -> tuple[int, int]:
        """Make a file, durably: ``write`` is given a binary file. Nothing reads it before a commit names it.

        Returns:
            Its size in bytes and its modification time in milliseconds since 1970.

        Raises:
            LabelError: the storage refuses.
        """
        ...

    def open(self, path: str) -> pq.ParquetFile:
        """A file, to read. Raises OSError or ArrowInvalid where it is missing or corrupt."""
        ...

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file, None where it does not exist. Raises OSError where the storage cannot be asked."""
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
        self.folder, self._footers = Path(folder), _Footers()

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
            raise LabelError(f"{whole}: cannot write ({error.strerror or error}); free space or fix access") from None
        return status.st_size, int(status.st_mtime * 1000)

    def open(self, path: str) -> pq.ParquetFile:
        return self._footers.open(path, str(self.folder / path))

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        return [self._size(self.folder / path) for path in paths]

    @staticmethod
    def _size(path: Path) -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None


class S3Files:
    """Files below a prefix of a bucket."""

    def __init__(self, storage: Storage) -> None:
        try:
            from pyarrow.fs import S3FileSystem
        except ImportError:
            raise ConfigError("this build of pyarrow has no S3; install one that has, or use a folder") from None

        reach = _Reach.of(storage)
        options: dict[str, Any] = {"region": reach.region}
        if reach.endpoint is not None:
            parts = urlsplit(reach.endpoint)
            options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
        if reach.access_key_id is not None:
            options |= {"access_key": reach.access_key_id, "secret_key": reach.secret_access_key}
            options |= {"session_token": reach.session_token}
        self.table, self._footers = storage.table, _Footers()
        self._system = S3FileSystem(**options)

    def _key(self, path: str) -> str:
        return f"{self.table.removeprefix('s3://')}/{path}"

    def write(self, path: str, write: Callable[[Any], None]) -> tuple[int, int]:
        try:
            with self._system.open_output_stream(self._key(path)) as file:  # visible once it is closed
                write(file)
            info = self._system.get_file_info(self._key(path))
        except OSError as error:
            raise LabelError(
                f"{self.table}/{path}: cannot write ({one_line(error)}); check bucket, endpoint and keys"
            ) from None
        return info.size, int(info.mtime_ns // 1_000_000)

    def open(self, path: str) -> pq.ParquetFile:
        # pre_buffer reads the columns of a row group in few requests.
        return self._footers.open(path, self._system.open_input_file(self._key(path)), pre_buffer=True)

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        if not paths:
            return []
        found = self._system.get_file_info([self._key(path) for path in paths])
        return [info.size if info.is_file else None for info in found]


def one_line(error: object) -> str:
    """An error's message without colours, line breaks and XML, at most 300 characters: clients of S3 write pages."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    code = re.search(r"<Code>(\w+)</Code>", text)
    text = re.sub(r"<\?xml.*", f"({code.group(1)})" if code else "", text, flags=re.DOTALL)
    text = " ".join(text.replace("↳", " ").split())
    return text if len(text) <= 300 else text[:297] + "..."
