"""Where a label store lies: a folder, or a prefix of a bucket behind the S3 API.

Delta Lake reads and writes the table's log with its own client; data files and histories are read and written here
(`rayfm.labels.files`), on a folder with plain files and on S3 with Arrow's file system. Both clients get the same
endpoint, region and keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator, model_validator

from rayfm.config import Config, ConfigError, validate
from rayfm.labels.files import Files, LocalFiles, S3Files

FOLDER = "labels"
"""The table's folder below the root."""

HISTORIES = "histories"
"""The folder of the histories below the root."""

_S3 = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/?#\s]+)*/?")
_OPTIONS = ("endpoint", "region", "access_key_id", "secret_access_key", "session_token")


class Storage(Config):
    """Where the labels lie, and how to reach a bucket.

    What is not given comes from the usual environment variables, read in the process that opens the store, so that
    keys need not travel: ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or ``AWS_DEFAULT_REGION``,
    ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``; without keys, from the machine's role.
    """

    root: str
    """A local or mounted folder, or ``s3://bucket/prefix``. The table is the folder ``labels`` in it; histories are in
    its folder ``histories``."""
    endpoint: str | None = None
    """URL of an S3-compatible service, such as ``http://minio:9000``; by default AWS's own."""
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        return check_root(root)

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        return check_endpoint(endpoint)

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
        return self._below(FOLDER)

    def _below(self, folder: str) -> str:
        return str(Path(self.root) / folder) if self.local else f"{self.root.rstrip('/')}/{folder}"

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

    def files(self, folder: str = FOLDER) -> Files:
        """The files of a folder below the root: the table's data files, or the histories.

        Raises:
            ConfigError: this build of Arrow has no S3.
        """
        if self.local:
            return LocalFiles(self._below(folder))
        reach = _Reach.of(self)
        options: dict[str, Any] = {"region": reach.region}
        if reach.endpoint is not None:
            parts = urlsplit(reach.endpoint)
            options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
        if reach.access_key_id is not None:
            options |= {"access_key": reach.access_key_id, "secret_key": reach.secret_access_key}
            options |= {"session_token": reach.session_token}
        return S3Files(self._below(folder), s3_client()(**options))

    def stands(self) -> bool:
        """Whether anything was ever stored here: a table or histories.

        Raises:
            LabelError: the storage cannot be asked.
        """
        return any(self.files(folder).stand() for folder in (HISTORIES, FOLDER))

    def clear(self) -> None:
        """Delete the table and the histories, pinned or not. What else lies at the root, or beside it, stays.

        Raises:
            LabelError: the storage refuses. Some files may be gone then; clear it again.
        """
        for folder in (HISTORIES, FOLDER):
            self.files(folder).clear()

    def check_access(self) -> None:
        """Write a file and delete it, so that a wrong bucket or key shows before there is something to store.

        Raises:
            LabelError: the storage refuses.
        """
        self.files(HISTORIES).check_access()


def check_root(root: str) -> str:
    """``root`` if a store can lie there. Raises ValueError where it is a URL that is not ``s3://bucket/prefix``."""
    scheme, separator, _ = root.partition("://")
    if separator and scheme != "s3":
        raise ValueError(f"{scheme!r} is no storage; give a folder or s3://bucket/prefix")
    if separator and not _S3.fullmatch(root):
        raise ValueError("is not s3://bucket/prefix; correct it")
    return root


def check_endpoint(endpoint: str | None) -> str | None:
    """``endpoint`` if it is a service's URL, or None. Raises ValueError where it is something else."""
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ValueError("is not an http or https URL, such as http://minio:9000")
    return endpoint


def s3_client() -> Any:
    """Arrow's class of S3 file systems. Raises ConfigError where this build of Arrow has none."""
    try:
        from pyarrow.fs import S3FileSystem
    except ImportError:
        raise ConfigError("this build of pyarrow has no S3; install one that has, or use a folder") from None
    return S3FileSystem


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
