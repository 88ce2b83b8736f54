"""What all tables of one call share: the data, its days, who may read which features, how much to train."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import rayfm
from rayfm.config import ConfigError, nearest, read_yaml, validate
from rayfm.data.sources.base import SOURCES
from rayfm.pipeline.config import PipelineConfig

Mapping = dict[str, Any]

EXAMPLES = Path(rayfm.__file__).resolve().parents[1] / "examples"
"""Where the sources' own pipelines lie in a clone."""

SIMULATOR = "simulator"
_FILES = {SIMULATOR: "demo"}
"""Source -> example, where the names differ."""


@dataclasses.dataclass(frozen=True)
class Scope:
    """Everything that a table's studies are made of, besides what the table itself says."""

    source: str
    """Name of the source, as shown."""
    base: Mapping
    """``data``, ``schema`` and the ``training`` that teachers and students share."""
    periods: tuple[str, ...]
    """The source's periods."""
    cheap: tuple[str, ...]
    """Features that students read."""
    item: tuple[str, ...]
    """Those of them that describe the item."""
    seeds: tuple[int, ...]
    replicates: int
    quick: bool
    """Small models, little data: shows that a table works, not what is true."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the source's tasks."""
        return tuple(task["name"] for task in self.base["schema"]["tasks"])

    @property
    def traffics(self) -> tuple[str, ...]:
        """Names of the source's traffics."""
        return tuple(self.base["schema"]["traffics"])

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names of the source's sequence features."""
        return tuple(f["name"] for f in self.base["schema"]["features"] if f["kind"] == "sequence")

    def has_tasks(self, *names: str) -> tuple[str, ...]:
        """Those of ``names`` that the source has."""
        return tuple(name for name in names if name in self.tasks)


def example_of(source: str) -> Path:
    """The pipeline file that brings a source's data, schema and features.

    Args:
        source: a source's name, or the path of a pipeline's YAML file.

    Raises:
        ConfigError: neither is there.
    """
    if source.endswith((".yaml", ".yml")):
        return Path(source)
    path = EXAMPLES / f"{_FILES.get(source, source)}.yaml"
    if path.exists():
        return path
    known = sorted({*_FILES, *(file.stem for file in EXAMPLES.glob("*.yaml") if not file.stem.endswith("_schema"))})
    raise ConfigError(
        f"source {source!r}: no pipeline of that name{nearest(source, known)}; or give the path of a pipeline's YAML "
        "file, whose data, schema and features the tables then use"
    )


def open_scope(source: str, data: str | None = None, seeds: tuple[int, ...] = (1, 2, 3), quick: bool = False) -> Scope:
    """The scope of a source.

    The pipeline file needs a student called ``fm``, whose features students read, and one called ``two_tower``, whose
    ``item_features`` name the item's; its group ``students`` gives the training.

    Args:
        source: a source's name, or the path of a pipeline's YAML file.
        data: folder of the source's files, where it has any.
        seeds: student seeds.
        quick: make everything small.

    Raises:
        ConfigError: no such source, or its file lacks what tables need.
    """
    path = example_of(source)
    mapping = read_yaml(path)
    if data is not None:
        mapping["data"]["source"]["path"] = data
    if quick and mapping["data"]["source"]["type"] == SIMULATOR:
        mapping["data"]["source"] |= {"periods": 9, "requests_per_period": 150}
    config = validate(PipelineConfig, copy.deepcopy(mapping), str(path))
    for name in ("fm", "two_tower"):
        if name not in mapping["students"]:
            raise ConfigError(f"{path}: tables need a student called {name!r}, whose features they use; add one")
    item = mapping["students"]["two_tower"]["model"]["item_features"]
    features = mapping["students"]["fm"]["model"].get("features")
    cheap = tuple(features or (feature["name"] for feature in mapping["schema"]["features"]))
    training = {**mapping["groups"]["students"], "reader": "arrow"}
    if quick:
        lanes = config.data.lanes
        training |= {"batch_size": 32 * lanes, "predict_batch_size": 512 * lanes}
    periods = tuple(p.name for p in SOURCES.build(config.data.source, config.schema_).periods())
    return Scope(
        source=path.stem if source.endswith((".yaml", ".yml")) else source,
        base={"data": mapping["data"], "schema": config.dump()["schema"], "training": training},
        periods=periods,
        cheap=cheap,
        item=tuple(item),
        seeds=seeds[:1] if quick else seeds,
        replicates=20 if quick else 200,
        quick=quick,
    )
