"""The data sets to compare on, each as plain Parquet of a part to train on and a part that is held out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.others import planted
from rayfm.config import read_yaml
from rayfm.schema import Schema

ROOT = Path(__file__).resolve().parents[2]
TABLE_ROWS = 100_000
LARGEST = 5.6
"""``log(1 + x)`` of the largest of a million dense values: dense features are scaled to [0, 1], as FuxiCTR's are."""

BLOCK_ROWS = 1_000_000
"""Rows of a file that FuxiCTR's encoder writes, where one file (its default) would be large."""

CRITEO = {
    "criteo-100k": (100_000, planted.AS_CRITEO),
    "criteo-1m": (1_000_000, planted.AS_CRITEO),
    "criteo-5m": (5_000_000, planted.AS_CRITEO),
    "criteo-20m": (20_000_000, planted.AS_CRITEO),
    "large-1m": (1_000_000, planted.ALL_LARGE),
}
"""Generated data sets -> rows, and ids of each sparse feature."""
DATA = (*CRITEO, "kuairand")
MODELS = ("dcnv2", "deepfm")

Kind = Literal["dense", "sparse", "multi"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths of both models, and the rows of a batch."""

    embedding_dim: int
    hidden: tuple[int, ...]
    cross_layers: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rates of both sides: for generated rows the best of several on the held-out rows themselves."""

    tables: float
    """Of rayfm's row-wise Adagrad."""
    dense: float
    """Of rayfm's Adam."""
    fuxictr: float
    """Of FuxiCTR's Adam, which trains tables and all else with one rate."""


RATES = {
    ("criteo", "dcnv2"): Rates(0.1, 0.003, 0.01),
    ("criteo", "deepfm"): Rates(0.01, 0.001, 0.0003),
    ("kuairand", "dcnv2"): Rates(0.02, 0.001, 0.0003),
    ("kuairand", "deepfm"): Rates(0.02, 0.001, 0.0003),
}
"""With a million generated rows, rayfm's are the best of four (DCNv2) and six (DeepFM) pairs, FuxiCTR's of four and
five rates. With KuaiRand, rayfm's are those of the example, and FuxiCTR's the best of three."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A data set on disk: ``<folder>/train`` and ``<folder>/test``, in time order."""

    name: str
    folder: Path
    schema: Schema
    sizes: Sizes

    def rates(self, model: str) -> Rates:
        return RATES["criteo" if self.name in CRITEO else self.name, model]

    @property
    def periods(self) -> tuple[str, str]:
        """What the two parts are called in an example store."""
        first, second = planted.PERIODS
        return first, second

    def rows(self, part: str) -> int:
        return sum(pq.read_metadata(path).num_rows for path in (self.folder / part).glob("*.parquet"))

    def columns(self) -> list[dict[str, str]]:
        """Name, kind and type of every feature, for what knows nothing of rayfm's schema."""
        return [
            {"name": feature.name, "kind": feature.kind, "type": "str" if feature.id_type == "string" else "int"}
            for feature in self.schema.features
        ]


def model_mapping(name: str, sizes: Sizes) -> dict[str, Any]:
    """rayfm's config of a model."""
    mapping: dict[str, Any] = {"type": name, "embedding_dim": sizes.embedding_dim, "hidden": list(sizes.hidden)}
    return mapping | ({"cross_layers": sizes.cross_layers} if name == "dcnv2" else {})


def open_case(name: str, work: Path, kuairand: Path | None = None) -> Case:
    """The case called ``name`` below ``work``; its files are written where they are not there yet."""
    folder = work / name
    case = Case(name, folder, *(_criteo() if name in CRITEO else _kuairand()))
    if not (folder / "written").exists():
        if name in CRITEO:
            planted.write(folder, *CRITEO[name])
        else:
            if kuairand is None:
                raise SystemExit("kuairand needs --kuairand FOLDER, the folder with its official files")
            write_kuairand(folder, kuairand, case.schema)
        (folder / "written").touch()
    return case


def _criteo() -> tuple[Schema, Sizes]:
    dense = {"kind": "dense", "transform": "log1p", "std": LARGEST}
    schema = {
        "tables": {f"c{i}": {"rows": TABLE_ROWS} for i in range(planted.SPARSE)},
        "features": [
            *(dense | {"name": f"i{i}"} for i in range(planted.DENSE)),
            *({"name": f"c{i}", "kind": "sparse"} for i in range(planted.SPARSE)),
        ],
        "tasks": [{"name": "click"}],
    }
    return Schema.model_validate(schema), Sizes(embedding_dim=16, hidden=(256, 128), cross_layers=2, batch=4096)


def _kuairand() -> tuple[Schema, Sizes]:
    """The categorical features that the students of examples/kuairand.yaml read; clicks."""
    example = read_yaml(ROOT / "examples" / "kuairand.yaml")
    names = example["students"]["fm"]["model"]["features"]
    whole = example["schema"]
    features = [feature for feature in whole["features"] if feature["name"] in names]
    tables = {feature.get("table", feature["name"]) for feature in features}
    schema = {
        "tables": {name: table for name, table in whole["tables"].items() if name in tables},
        "features": features,
        "tasks": [{"name": "click"}],
    }
    batch = example["groups"]["students"]["batch_size"]
    return Schema.model_validate(schema), Sizes(embedding_dim=8, hidden=(128, 64), cross_layers=2, batch=batch)


def write_kuairand(folder: Path, official: Path, schema: Schema) -> None:
    """Join the official files to one flat log (no side's cost), and cut it in two by time."""
    import tempfile

    import ray

    from rayfm.data.prepare import prepare
    from rayfm.data.sources.base import SOURCES
    from rayfm.data.store import ExampleStore

    whole = Schema.model_validate(read_yaml(ROOT / "examples" / "kuairand.yaml")["schema"])
    kind = SOURCES["kuairand"]
    with tempfile.TemporaryDirectory() as scratch:
        store = ExampleStore(Path(scratch))
        ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        try:
            manifests = prepare(kind(kind.Config(path=str(official.absolute())), whole), whole, store)
        finally:
            ray.shutdown()
        tables = [
            pa.concat_tables(
                pq.ParquetFile(path).read() for path in sorted(store.period_dir(m.period).rglob("*.parquet"))
            )
            for m in manifests
        ]
        log = pa.concat_tables(tables).sort_by([("time", "ascending"), ("example_id", "ascending")])
    log = log.select([*(feature.name for feature in schema.features), "click"]).combine_chunks()
    trained = log.num_rows - round(log.num_rows * planted.TEST_SHARE)
    for day, (part, rows) in enumerate((("train", log.slice(0, trained)), ("test", log.slice(trained)))):
        (folder / part).mkdir(parents=True)
        pq.write_table(
            planted.timed(rows, day, 0, rows.num_rows), folder / part / "part-0000.parquet", row_group_size=65_536
        )


def describe(case: Case, model: str) -> str:
    """The case as JSON, for the process that runs FuxiCTR."""
    rows = {part: case.rows(part) for part in ("train", "test")}
    described = {
        "data": str(case.folder.absolute()),
        "columns": case.columns(),
        "rows": rows,
        # A part of fewer rows than a block would be no block at all.
        "block_rows": min(BLOCK_ROWS, rows["test"]) if rows["train"] > 2 * BLOCK_ROWS else 0,
        "model": model,
    }
    return json.dumps(described | dataclasses.asdict(case.sizes))
