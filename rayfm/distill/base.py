"""What an objective is: one term of a student's loss, which may own heads and adapters that serving drops.

Shape letters: B examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from rayfm.config import Config, ConfigError, Registry
from rayfm.data.batch import Batch
from rayfm.models.base import ModelOutput
from rayfm.schema import Schema

OBJECTIVES = Registry("objective", "rayfm.distill")


@dataclasses.dataclass
class Term:
    """One term of the loss as sums, so that N workers agree with one: loss = weighted_sum / total weight over ranks."""

    weighted_sum: Tensor
    """Scalar: the sum of weight x loss over this rank's rows."""
    weight: Tensor
    """Scalar: the sum of the weights of those rows."""
    coefficient: float = 1.0
    """Factor of the term in the loss (ExFM's w). Metrics show the term without it."""


class ObjectiveConfig(Config):
    """What every objective's config has; its own ``Config`` adds ``type: Literal[...]``."""

    name: str | None = None
    """Name of the term in metrics; by default the type. Two objectives of one type need names."""

    needs_requests: ClassVar[bool] = False
    """Whether the objective compares rows of one request, and so needs the column ``request_id``."""

    @property
    def label(self) -> str:
        """What the objective's terms are called by."""
        return self.name or str(vars(self)["type"])

    def supervision(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the supervision columns that the objective reads, for a student with these tasks."""
        return ()

    def replaces_supervised(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a student's ``tasks`` whose own loss the objective takes the place of."""
        return ()

    def representations(self) -> dict[str, int | None]:
        """Teachers whose stored representation the objective reads, each with its width where that is known."""
        return {}

    def with_widths(self, widths: dict[str, int]) -> ObjectiveConfig:
        """The same config, told the widths of the teachers' representations."""
        return self

    def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
        """Refuse, before anything is trained, what does not fit a student with these tasks.

        Raises:
            ConfigError: naming the key.
        """


def check_names(objectives: Sequence[ObjectiveConfig]) -> None:
    """Refuse two objectives of one student whose terms would have one name, so that one would hide the other.

    Raises:
        ConfigError: naming it.
    """
    labels = [objective.label for objective in objectives]
    for objective, label in zip(objectives, labels, strict=True):
        taken = label == "supervised" and vars(objective)["type"] != "supervised"
        if taken or labels.count(label) > 1:
            why = "; the tasks' own loss has it" if taken else ""
            raise ConfigError(f"two objectives are called {label!r}{why}; give each a 'name' of its own")


class Objective(nn.Module):
    """Base of the objectives. A subclass registers itself with ``@OBJECTIVES.register(name)`` and nests a ``Config``.

    Args:
        config: the objective's own config.
        schema: the pipeline's schema.
        tasks: the student's tasks.
        representation_dim: H, the width of ``ModelOutput.representation``.
    """

    def __init__(
        self, config: ObjectiveConfig, schema: Schema, tasks: tuple[str, ...], representation_dim: int
    ) -> None:
        super().__init__()
        self.config, self.schema, self.tasks = config, schema, tasks

    def forward(self, batch: Batch, output: ModelOutput) -> dict[str, Term]:
        """The objective's terms by name (``click``, ``adapted/click``, ...)."""
        raise NotImplementedError

    def pre_step(self, batch: Batch) -> dict[str, Term] | None:
        """Terms for what learns before the student does (an adapter); its parameters are ``pre_step_parameters()``.

        The loop sums and reduces these terms, back-propagates them and steps a dense optimiser of their own, then
        calls ``forward``. None where there is nothing to learn first.
        """
        return None

    def pre_step_parameters(self) -> list[nn.Parameter]:
        """Parameters that only ``pre_step`` updates; they get no gradient from ``forward``."""
        return []
