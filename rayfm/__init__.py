"""rayfm: train large recommender teachers on Ray, let them label what students see, distil the labels into students.

The functions of the command line, by the same names::

    import rayfm

    config = rayfm.load_config("examples/demo.yaml", ["seeds=[1,2,3]"])
    result = rayfm.run(config, overwrite=True)
    print(result.report)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayfm.config.errors import RayfmError
    from rayfm.pipeline.config import PipelineConfig, load_config
    from rayfm.pipeline.parts import evaluate, label, prepare, train, write_report
    from rayfm.pipeline.select import SelectResult, select
    from rayfm.pipeline.stream import RunResult, run
    from rayfm.pipeline.tune import TuneResult, tune

__version__ = "0.1.0"

_HOMES = {
    "RayfmError": "rayfm.config.errors",
    "PipelineConfig": "rayfm.pipeline.config",
    "load_config": "rayfm.pipeline.config",
    "evaluate": "rayfm.pipeline.parts",
    "label": "rayfm.pipeline.parts",
    "prepare": "rayfm.pipeline.parts",
    "train": "rayfm.pipeline.parts",
    "write_report": "rayfm.pipeline.parts",
    "SelectResult": "rayfm.pipeline.select",
    "select": "rayfm.pipeline.select",
    "RunResult": "rayfm.pipeline.stream",
    "run": "rayfm.pipeline.stream",
    "TuneResult": "rayfm.pipeline.tune",
    "tune": "rayfm.pipeline.tune",
}

__all__ = [
    "PipelineConfig",
    "RayfmError",
    "RunResult",
    "SelectResult",
    "TuneResult",
    "evaluate",
    "label",
    "load_config",
    "prepare",
    "run",
    "select",
    "train",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use: importing torch and Ray takes seconds."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rayfm' has no attribute {name!r}")
