"""A compiled student against the exported module: ``python -m benchmarks.serving STORE dlrm|dcnv2 FORM``.

Both are called in this process, in one thread, on requests in memory; the form is ``eager``, ``torchscript``, ``int8``
or ``aot_bf16``. Ours looks rows up in merged tables and runs the rest in the form; theirs is the fp32 module of
`rayfm.export.served`. The line is for 1,000 candidates a request; smaller and larger requests are printed before it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import model_config, schema
from benchmarks.measure import Outcome, in_turns, rates, report, timed
from benchmarks.training import HELD, batches_in_memory
from rayfm.data.batch import Batch
from rayfm.data.store import ExampleStore
from rayfm.export.config import CompileConfig, Tolerance
from rayfm.export.served import export_model
from rayfm.export.student import export_student
from rayfm.models.build import build_model

SIZES = (64, 1_000, 8_192)
LINE = 1_000
ROWS = 20_000
"""Candidates of one timed piece of work."""


def requests(model: Callable[[Batch], Any], held: list[Batch]) -> float:
    """Answer requests until ROWS candidates are scored; returns how many were."""
    size = len(held[0])
    with torch.inference_mode():
        for batch in islice(cycle(held), -(-ROWS // size)):
            model(batch)
    return float(-(-ROWS // size) * size)


def compare(store: ExampleStore, size: int, models: tuple[Any, Any]) -> Outcome:
    """Candidates a second of both, in turns."""
    ours, theirs = models
    held = batches_in_memory(store, HELD, size)
    return rates(
        in_turns(lambda: timed(lambda: requests(ours, held)), lambda: timed(lambda: requests(theirs, held)), repeats=3),
        "candidates",
    )


def both(name: str, form: str, cache: str) -> tuple[Any, Any]:
    """The student in the form, and the exported module, of the same weights."""
    config = CompileConfig.model_validate(
        # Weights that were never trained, and random rows: speed is measured here, and the check has its own tests.
        {"compile": form, "cache": cache, "tolerance": Tolerance(reduced=0.1, calibration=0.1)}
    )
    tensors = dict(build_model(model_config(name), schema(), ("click",), seed=1).state_dict())
    theirs = export_model(model_config(name), schema(), ("click",), tensors)
    # A copy: ours takes its tensors over.
    copied = {key: value.clone() for key, value in tensors.items()}
    return export_student(model_config(name), schema(), ("click",), copied, config), theirs


def main(store: ExampleStore, name: str, form: str) -> None:
    """Every size; the last line of the output is for 1,000 candidates."""
    with tempfile.TemporaryDirectory() as cache:
        models = both(name, form, cache + "/compiled")
        for size in (*(size for size in SIZES if size != LINE), LINE):
            outcome = compare(store, size, models)
            print(f"{size:>6} candidates: {outcome.ours} against {outcome.theirs}, ratio {outcome.ratio:.2f}")
        report(outcome)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(ExampleStore(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
