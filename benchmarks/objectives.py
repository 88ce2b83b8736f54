"""A step with auxiliary head and student adapter against one without.

``python -m benchmarks.objectives STORE dlrm|dcnv2 fp32|bf16``. Both are the same learner on the same batches in memory;
only the objectives differ.
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
from rayfm.distill.base import OBJECTIVES
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import Learner, LearnerConfig
from rayfm.training.trainer import single_process_group

STEPS = 8
"""Steps in a turn."""


def supervised(batch: Batch) -> Batch:
    """The batch with a teacher's prediction in every row."""
    generator = torch.Generator().manual_seed(len(batch))
    return dataclasses.replace(
        batch,
        supervision=torch.rand(len(batch), 1, generator=generator),
        supervision_mask=torch.ones(len(batch), 1, dtype=torch.bool),
        supervision_names=("teacher/click",),
    )


def compare(store: ExampleStore, name: str, precision: str) -> Outcome:
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
                objectives=tuple(OBJECTIVES[kind].Config(teacher="teacher") for kind in objectives),
            )
            learner = Learner(config, training, schema(), torch.device("cpu"), Path(folder) / f"{variant}.json")

            def run() -> float:
                for position, batch in enumerate(islice(cycle(held), STEPS)):
                    learner.train_step(batch, position)
                return STEPS

            return run

        distilled = steps("distilled", "auxiliary_head", "student_adapter")
        plain = steps("plain")
        return times(in_turns(lambda: timed(distilled), lambda: timed(plain), repeats=5), "step")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(compare(ExampleStore(Path(sys.argv[1])), sys.argv[2], sys.argv[3]))
