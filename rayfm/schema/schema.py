"""What an example is: tables, features, tasks and traffics, and the columns they make in the example store."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import Field, model_validator

from rayfm.config import Config, nearest
from rayfm.schema.hashing import salt_of

EXAMPLE_ID, TIME, TRAFFIC = "example_id", "time", "traffic"
REQUIRED_COLUMNS: dict[str, pa.DataType] = {EXAMPLE_ID: pa.int64(), TIME: pa.int64(), TRAFFIC: pa.string()}
"""``time`` is in microseconds since 1970-01-01 UTC."""

RESERVED_COLUMNS: dict[str, pa.DataType] = {
    "request_id": pa.int64(),
    "user_id": pa.int64(),
    "stage_reached": pa.string(),
    "rank": pa.int32(),
    "campaign": pa.string(),
    "sampling_weight": pa.float32(),
}
"""Optional columns with a meaning of their own (DESIGN, example store). A source may have any of them."""

LOGGED_PREFIX = "logged/"
"""``logged/<model>/<task>``: a production model's prediction from when the example was ranked (float32)."""

WEIGHTS_SUFFIX = "__weights"
"""A weighted feature ``f`` has its weights in the column ``f__weights``, a list as long as ``f``'s."""

Kind = Literal["impression", "consideration"]
KINDS: tuple[Kind, Kind] = ("impression", "consideration")

FeatureKind = Literal["dense", "sparse", "multi", "weighted", "sequence"]


class VocabularyConfig(Config):
    """When an id gets a row of its own."""

    min_count: int = Field(5, ge=1)
    """Times that an id was seen in the impressions of the periods trained on so far, with the one about to be."""

    shared_rows: int | None = Field(None, ge=1)
    """Rows of the table that the other ids share by their hash; by default a tenth of them."""

    decay: float = Field(0.9, gt=0, le=1)
    """With ``managed``: what is left of a count after each period."""

    max_candidates: int = Field(10_000_000, ge=0)
    """Ids whose count is remembered before they have a row, 16 bytes each; of more, the most frequent ones."""


class Table(Config):
    """An embedding table that one or more features look up."""

    rows: int = Field(gt=0, le=2**40)
    """Rows of the table; ids are hashed into them."""

    salt: int | None = None
    """Salt of the hash; by default derived from the table's name."""

    ids: Literal["hash", "modulo"] = "hash"
    """``modulo``: ids are integers that count from 0 already, and the row is ``id mod rows``: no two ids below ``rows``
    collide, which a hash into a table of n ids' size makes for a third of them."""

    id_policy: Literal["hash", "vocabulary", "managed"] = "hash"
    """``vocabulary``: ids that were seen often enough have rows of their own, the others share a hashed part.
    ``managed``: where none is left, an id that is seen more of late takes the row of the one that is seen least."""

    vocabulary: VocabularyConfig = VocabularyConfig()
    """With ``id_policy: vocabulary`` or ``managed``."""

    @property
    def shared_rows(self) -> int:
        """Rows at the table's start that ids without one of their own share; all of them without a vocabulary."""
        if self.id_policy == "hash":
            return self.rows
        return self.vocabulary.shared_rows or max(1, self.rows // 10)

    @model_validator(mode="after")
    def _ids_fit(self) -> Table:
        if self.id_policy == "hash":
            if self.vocabulary != VocabularyConfig():
                raise ValueError("'vocabulary' goes with id_policy: vocabulary or managed; set that, or leave it out")
            return self
        if self.ids == "modulo":
            raise ValueError(
                f"ids: modulo gives every id the row of its number, and id_policy: {self.id_policy} gives rows in "
                "order of admission; leave one of them out"
            )
        if self.shared_rows >= self.rows:
            raise ValueError(
                f"vocabulary.shared_rows {self.shared_rows} leaves none of the {self.rows} rows to an id of its own; "
                "lower it, or raise 'rows'"
            )
        return self


class Feature(Config):
    """One input of the models."""

    name: str = Field(pattern=r"^[A-Za-z_][\w./-]*$")
    kind: FeatureKind
    table: str | None = None
    """The table that ids are looked up in; by default a table of the feature's own name."""

    id_type: Literal["int64", "string"] = "int64"
    """Type of the ids in the example store."""

    negative_ids: Literal["reject", "allow"] = "reject"
    """Whether a negative id is a bad row or an id like any other."""

    transform: Literal["none", "log1p", "signed_log1p"] = "none"
    """Dense only. Applied to the stored value after ``missing``."""

    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    """Dense only: after the transform, ``(value - mean) / std``."""

    missing: float = 0.0
    """Dense only: stands in for a null."""

    max_len: int | None = Field(None, gt=0)
    """Lists only: a sequence keeps the newest (last) ``max_len`` ids, the others the first ``max_len``."""

    @property
    def is_list(self) -> bool:
        return self.kind in ("multi", "weighted", "sequence")

    @property
    def table_name(self) -> str:
        return self.table or self.name

    def arrow_type(self) -> pa.DataType:
        """Type of the feature's column in the example store."""
        if self.kind == "dense":
            return pa.float32()
        ids = pa.int64() if self.id_type == "int64" else pa.string()
        return pa.list_(ids) if self.is_list else ids

    @model_validator(mode="after")
    def _fits(self) -> Feature:
        if self.kind == "dense" and self.table is not None:
            raise ValueError(f"feature {self.name!r} is dense: it has no table; remove 'table'")
        if self.kind != "dense" and (self.transform, self.mean, self.std, self.missing) != ("none", 0.0, 1.0, 0.0):
            raise ValueError(f"feature {self.name!r} is {self.kind}: transform, mean, std, missing are for dense ones")
        if self.max_len is not None and not self.is_list:
            raise ValueError(f"feature {self.name!r} is {self.kind}: max_len is for lists")
        return self


class Task(Config):
    """What is predicted."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    kind: Literal["binary", "regression"] = "binary"
    transform: Literal["none", "log1p"] = "none"
    """Regression only: the model is trained, and RMSE is reported, on the transformed label."""

    weight: float = Field(1.0, ge=0)
    """Weight of the task's own loss."""

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if self.kind == "binary" and self.transform != "none":
            raise ValueError(f"task {self.name!r} is binary: it has no transform; remove 'transform'")
        return self


class Schema(Config):
    """Tables, features, tasks and traffics of a pipeline."""

    tables: dict[str, Table]
    features: tuple[Feature, ...] = Field(min_length=1)
    tasks: tuple[Task, ...] = Field(min_length=1)
    traffics: tuple[str, ...] = Field(("all",), min_length=1)
    """Every surface or domain that examples may come from; a row of another traffic is rejected."""

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        names = [feature.name for feature in self.features]
        reserved = {*REQUIRED_COLUMNS, *RESERVED_COLUMNS} - {"user_id", "campaign"}
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature {name!r} is defined twice")
            if name in reserved or name.startswith(LOGGED_PREFIX):
                raise ValueError(f"feature {name!r}: the name is reserved; call it otherwise")
        for feature in self.features:
            if feature.kind != "dense" and feature.table_name not in self.tables:
                raise ValueError(
                    f"feature {feature.name!r}: table {feature.table_name!r} is not defined"
                    f"{nearest(feature.table_name, list(self.tables))}"
                )
            if (
                feature.kind != "dense"
                and feature.id_type == "string"
                and self.tables[feature.table_name].ids != "hash"
            ):
                raise ValueError(
                    f"feature {feature.name!r} has string ids, but table {feature.table_name!r} takes ids modulo its "
                    "rows; remove 'ids: modulo'"
                )
        tasks = [task.name for task in self.tasks]
        for name in tasks:
            if tasks.count(name) > 1 or name in names:
                raise ValueError(f"task {name!r}: the name is taken")
        if len(set(self.traffics)) < len(self.traffics):
            raise ValueError("traffics: a name stands twice")
        return self

    def feature(self, name: str) -> Feature:
        """The feature called ``name``. Raises KeyError with the nearest known name."""
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(f"unknown feature {name!r}{nearest(name, [feature.name for feature in self.features])}")

    def task(self, name: str) -> Task:
        """The task called ``name``. Raises KeyError with the nearest known name."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(f"unknown task {name!r}{nearest(name, [task.name for task in self.tasks])}")

    def salt(self, table: str) -> int:
        salt = self.tables[table].salt
        return salt_of(table) if salt is None else salt

    def arrow_schema(self) -> pa.Schema:
        """The example store's required columns, in order: ids and time, features, tasks (null where unknown)."""
        fields = [pa.field(name, type_, nullable=False) for name, type_ in REQUIRED_COLUMNS.items()]
        for feature in self.features:
            if feature.name in REQUIRED_COLUMNS:
                continue
            fields.append(pa.field(feature.name, feature.arrow_type()))
            if feature.kind == "weighted":
                fields.append(pa.field(feature.name + WEIGHTS_SUFFIX, pa.list_(pa.float32())))
        fields += [pa.field(task.name, pa.float32()) for task in self.tasks]
        return pa.schema(fields)
