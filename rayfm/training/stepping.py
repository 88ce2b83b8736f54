"""How a period's steps are made: one by one, or through TorchRec's pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from rayfm.data.batch import Batch
from rayfm.training import sparse_dist
from rayfm.training.config import TrainingConfig
from rayfm.training.feed import Feed
from rayfm.training.learner import Learner

_LOG = logging.getLogger(__name__)


class Stepper(Protocol):
    """Makes one learner's steps, one after the other."""

    def train_step(self, batch: Batch, step: int) -> dict[str, tuple[float, float]]:
        """As `Learner.train_step`."""
        ...


class Stepping:
    """Decides who makes a learner's steps, and how far to read ahead for it.

    Args:
        training: ``pipeline``.
        learners: of one worker group.
        device: this rank's.
    """

    def __init__(self, training: TrainingConfig, learners: Sequence[Learner], device: torch.device) -> None:
        self.learners = learners
        wanted = training.pipeline == "sparse_dist" or (training.pipeline == "auto" and device.type == "cuda")
        self.one_by_one: dict[str, str] = {}
        """Learner whose steps are made one by one although the pipeline is asked for -> why."""
        self._pipelined = []
        for learner in learners if wanted else []:
            reason = sparse_dist.cannot_pipeline(learner)
            if reason is None:
                self._pipelined.append(learner.config.key)
                continue
            self.one_by_one[learner.config.key] = reason
            _LOG.warning("%s trains step by step, without TorchRec's pipeline: %s", learner.config.key, reason)
        self.ahead = sparse_dist.AHEAD if self._pipelined else int(device.type == "cuda")

    @contextmanager
    def steppers(self, feed: Feed) -> Iterator[list[tuple[Learner, Stepper]]]:
        """Each learner with who makes its steps on ``feed``'s batches, until the block is left."""
        pipelines = {
            key: sparse_dist.SparseDist(learner, feed.on_device())
            for learner in self.learners
            if (key := learner.config.key) in self._pipelined
        }
        yield [(learner, pipelines.get(learner.config.key, learner)) for learner in self.learners]
        # Not after an error, or a stop: nobody asks these models anything any more.
        for pipeline in pipelines.values():
            pipeline.close()
