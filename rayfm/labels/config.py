"""Where a pipeline keeps the labels of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rayfm.config import Config, ConfigError, validate
from rayfm.labels.storage import Storage, check_endpoint, check_root, s3_client

_KEYS = ("access_key_id", "secret_access_key", "session_token")


class LabelStoreConfig(Config):
    """Where the labels and histories of runs lie. A text alone is the ``root``.

    A bucket's keys come from the environment of each process that reads or writes labels (``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``), or from its machine's role; so may endpoint and region.
    """

    root: str = Field(min_length=1)
    """A folder that every node sees, or ``s3://bucket/prefix``. The labels and histories of a run lie below it, in a
    folder of the run's name."""
    endpoint: str | None = None
    """URL of an S3-compatible service, such as ``http://minio:9000``; by default that of the environment, else AWS."""
    region: str | None = None
    """The bucket's region; by default that of the environment."""

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"root": value}
        given = [key for key in _KEYS if isinstance(value, Mapping) and key in value]
        if given:
            # A ConfigError, not a ValueError: that one is reported with the value, which is a secret.
            raise ConfigError(
                f"label_store: {given[0]!r} has no place in a config, which every run saves; set "
                f"AWS_{given[0].upper()} in the environment"
            )
        return value

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        return check_root(root).rstrip("/") or "/"

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        return check_endpoint(endpoint)

    @model_validator(mode="after")
    def _check_reach(self) -> LabelStoreConfig:
        if not self.local:
            s3_client()
        elif self.endpoint is not None or self.region is not None:
            key = "endpoint" if self.endpoint is not None else "region"
            raise ValueError(f"{key!r} is for s3:// roots; the root is the folder {self.root!r}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    @property
    def local(self) -> bool:
        """Whether the root is a folder."""
        return not self.root.startswith("s3://")

    def absolute(self) -> LabelStoreConfig:
        """The same place for processes that stand in other folders."""
        return self.model_copy(update={"root": str(Path(self.root).absolute())}) if self.local else self

    def of_run(self, name: str) -> Storage:
        """Where the run of this name keeps its labels."""
        options = {key: value for key, value in (("endpoint", self.endpoint), ("region", self.region)) if value}
        return Storage(root=f"{self.root.rstrip('/')}/{name}", **options)


def run_storage(run_dir: Path, name: str, place: Any) -> Storage:
    """Where the run in ``run_dir`` keeps its labels.

    Args:
        run_dir: its folder.
        name: its name.
        place: ``label_store`` of the config that it saved; None: its own folder.

    Raises:
        ConfigError: ``place`` is none.
    """
    if place is None:
        return Storage.of(run_dir)
    return validate(_Saved, {"label_store": place}, str(run_dir / "config.yaml")).label_store.of_run(name)


class _Saved(Config):
    label_store: LabelStoreConfig
