"""A step with objectives against one without.

``python -m benchmarks.objectives STORE dlrm|dcnv2 fp32|bf16 [OBJECTIVE ...]``, by default with the auxiliary head and
the student adapter: ExFM's full loss. Both are the same learner on the same batches in memory; only the objectives
differ. Requests have 8 rows, and the teacher's representation is 128 wide.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.data import BATCH, model_config, schema
from benchmarks.measure import Outcome, in_turns, report, timed, times
from benchmarks.training import HELD, batches_in_memory
from rayfm.data.batch import Batch
from rayfm.data.store import ExampleStore
from rayfm.distill.base import OBJECTIVES, ObjectiveConfig
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import Learner, LearnerConfig
from rayfm.training.trainer import single_process_group

STEPS = 8
"""Steps in a turn."""

EXFM = ("auxiliary_head", "student_adapter")
REQUEST_ROWS = 8
WIDTH = 128
"""Of the teacher's representation."""


def supervised(batch: Batch) -> Batch:
    """The batch with a teacher's prediction and representation in every row, and with requests."""
    rows = len(batch)
    generator = torch.Generator().manual_seed(rows)
    return dataclasses.replace(
        batch,
        supervision=torch.rand(rows, 1, generator=generator),
        supervision_mask=torch.ones(rows, 1, dtype=torch.bool),
        supervision_names=("teacher/click",),
        representation=torch.randn(rows, WIDTH, generator=generator),
        representation_mask=torch.ones(rows, 1, dtype=torch.bool),
        representation_widths=(("teacher", WIDTH),),
        group=torch.arange(rows) // REQUEST_ROWS,
    )


def objective(kind: str) -> ObjectiveConfig:
    """An objective with its defaults that learns from the one teacher."""
    part = OBJECTIVES[kind].Config
    required = [name for name, field in part.model_fields.items() if field.is_required()]
    config: ObjectiveConfig = part(**dict.fromkeys(required, "teacher"))
    return config.with_widths({"teacher": WIDTH})


def compare(store: ExampleStore, name: str, precision: str, kinds: tuple[str, ...] = EXFM) -> Outcome:
    """Seconds a step of both, in turns."""
    training = TrainingConfig.model_validate({"batch_size": BATCH, "precision": precision})
    held = [supervised(batch) for batch in batches_in_memory(store, HELD)]
    with tempfile.TemporaryDirectory() as folder, single_process_group():

        def steps(variant: str, *objectives: str) -> Callable[[], float]:
            config = LearnerConfig(
                model_name=name,
                variant=variant,
                seed=1,
                model=model_config(name),
                tasks=("click",),
                objectives=tuple(objective(kind) for kind in objectives),
            )
            learner = Learner(config, training, schema(), torch.device("cpu"), Path(folder) / f"{variant}.json")

            def run() -> float:
                for position, batch in enumerate(islice(cycle(held), STEPS)):
                    learner.train_step(batch, position)
                return STEPS

            return run

        distilled = steps("distilled", *kinds)
        plain = steps("plain")
        return times(in_turns(lambda: timed(distilled), lambda: timed(plain), repeats=5), "step")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(compare(ExampleStore(Path(sys.argv[1])), sys.argv[2], sys.argv[3], tuple(sys.argv[4:]) or EXFM))
