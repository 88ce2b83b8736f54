"""``rayfm list models``: how large models are."""

from __future__ import annotations

from pydantic import ValidationError
from rich.table import Table

from rayfm.config import ConfigError
from rayfm.models.base import MODELS
from rayfm.models.size import HISTORY, REFERENCE_SCHEMA, ModelSize, model_size, reference_config
from rayfm.pipeline.config import PipelineConfig, StudentConfig, TeacherConfig

NOTE = (
    "tables, dense: parameters of the embedding tables and of everything else. FLOPs: operations of one example's "
    "forward, counted with every list at its full length."
)


def model_table() -> tuple[Table, str]:
    """The registered models at scale 1 on the reference schema, and what stands below."""
    table = _table("type", "tables", "dense", "FLOPs")
    table.add_column("what it is", overflow="fold")
    tasks = tuple(task.name for task in REFERENCE_SCHEMA.tasks)
    left_out = ""
    for name in MODELS:
        try:
            cells = _cells(model_size(reference_config(name), REFERENCE_SCHEMA, tasks))
        except (ValidationError, ConfigError):
            cells = ("-", "-", "-")
            left_out = " A model with - needs keys that have no default: count it in your own config (--config FILE)."
        table.add_row(name, *cells, _first_line(name))
    kinds = [feature.kind for feature in REFERENCE_SCHEMA.features]
    rows = max(table.rows for table in REFERENCE_SCHEMA.tables.values())
    schema = (
        f"Each at its defaults (scale 1), on {kinds.count('dense')} dense features, {kinds.count('sparse')} ids with a "
        f"table of {rows:,} rows each, a history of {HISTORY} items, and one task."
    )
    return table, f"{NOTE} {schema}{left_out}"


def pipeline_table(config: PipelineConfig) -> tuple[Table, str]:
    """The models of a pipeline, each at its own scale and with its own features, and what stands below."""
    table = _table("model", "tables", "dense", "FLOPs")
    for column in ("scale", "type", "role"):
        table.add_column(column, justify="right" if column == "scale" else "left", overflow="fold")
    parts: list[tuple[str, str, TeacherConfig | StudentConfig]] = []
    parts += [(name, "teacher", teacher) for name, teacher in config.teachers.items()]
    parts += [(name, student.stage, student) for name, student in config.students.items()]
    for name, role, part in parts:
        size = model_size(part.model, config.schema_, config.tasks_of(part))
        table.add_row(name, *_cells(size), f"{part.model.scale:g}", str(vars(part.model)["type"]), role)
    return table, NOTE


def short(number: int) -> str:
    """Three digits and a unit: ``41.6M``."""
    value = float(number)
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{number}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=position > 0, overflow="fold")
    return table


def _cells(size: ModelSize) -> tuple[str, str, str]:
    return short(size.table_parameters), short(size.dense_parameters), short(size.flops)


def _first_line(name: str) -> str:
    lines = (MODELS[name].__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""
