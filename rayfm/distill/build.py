"""A model's objectives from their configs: checked, the tasks' own loss among them."""

from __future__ import annotations

from collections.abc import Sequence

from rayfm.distill.base import OBJECTIVES, Objective, ObjectiveConfig, check_names
from rayfm.distill.supervised import Supervised
from rayfm.schema import Schema


def check_objectives(configs: Sequence[ObjectiveConfig], schema: Schema, tasks: tuple[str, ...]) -> None:
    """Refuse, before anything is trained, objectives that do not fit a model with ``tasks``, or one another.

    Raises:
        ConfigError: naming the objective.
    """
    check_names(configs)
    for config in configs:
        config.check(schema, tasks)


def build_objectives(
    configs: Sequence[ObjectiveConfig], schema: Schema, tasks: tuple[str, ...], representation_dim: int
) -> list[Objective]:
    """The objectives of one model, the tasks' own loss first for every task whose place none of them takes.

    Args:
        configs: the objectives that the user lists.
        schema: the pipeline's schema.
        tasks: the model's tasks.
        representation_dim: H, the width of ``ModelOutput.representation``.

    Raises:
        ConfigError: as `check_objectives`.
    """
    check_objectives(configs, schema, tasks)
    replaced = {task for config in configs for task in config.replaces_supervised(tasks)}
    left = tuple(task for task in tasks if task not in replaced)
    default: list[ObjectiveConfig] = [Supervised.Config(tasks=left)] if left else []
    return [OBJECTIVES.build(config, schema, tasks, representation_dim) for config in (*default, *configs)]
