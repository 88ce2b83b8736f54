"""Whether a period's examples have the columns that the learners' objectives cannot do without."""

from __future__ import annotations

from collections.abc import Iterable

from rayfm.config import DataError, nearest
from rayfm.data.store import ExampleStore
from rayfm.schema import LOGGED_PREFIX
from rayfm.training.learner import LearnerConfig


def check_requests(store: ExampleStore, period: str, learners: Iterable[LearnerConfig]) -> None:
    """Raises DataError where an objective compares rows of one request and the examples do not know theirs."""
    for learner in learners:
        for objective in learner.objectives:
            if objective.needs_requests and "request_id" not in store.manifest(period).columns:
                raise DataError(
                    f"{store.period_dir(period)}: column 'request_id' is missing, and objective "
                    f"{objective.label!r} of {learner.key} compares rows of one request; prepare examples that "
                    "have it, or leave the objective out"
                )


def check_logged(store: ExampleStore, period: str, learners: Iterable[LearnerConfig]) -> None:
    """Raises DataError where all that an objective learns from are logged predictions that the examples lack."""
    columns = store.manifest(period).columns
    for learner in learners:
        for objective in learner.objectives:
            read = objective.supervision(learner.tasks)
            absent = [name for name in read if name.startswith(LOGGED_PREFIX) and name not in columns]
            if read and len(absent) == len(read):
                known = [name for name in columns if name.startswith(LOGGED_PREFIX)]
                raise DataError(
                    f"{store.period_dir(period)}: column {absent[0]!r} is missing, and objective "
                    f"{objective.label!r} of {learner.key} learns from nothing else; prepare examples that have "
                    f"it, or name a teacher, for cross_stage as 'fallback'{nearest(absent[0], known)}"
                )
