"""Build a model from its config: what training and export call."""

from __future__ import annotations

import contextlib

import torch

from rayfm.config import ConfigError, nearest
from rayfm.models.activations import clip_activations
from rayfm.models.base import MODELS, Model, ModelConfig
from rayfm.models.scaling import scaled
from rayfm.schema import Schema


def build_model(
    config: ModelConfig,
    schema: Schema,
    tasks: tuple[str, ...],
    *,
    device: torch.device | None = None,
    embedding_device: torch.device | None = None,
    seed: int | None = None,
) -> Model:
    """The model that ``config.type`` names, at the config's scale.

    Args:
        config: a model's config.
        schema: the pipeline's schema.
        tasks: the tasks to predict.
        device: where the dense layers are built, by default torch's default device. All of a model may be built on
            ``meta``: each layer that owns parameters has ``reset_parameters``.
        embedding_device: where the embedding collections are built, by default ``device``. ``meta`` for a model that
            DistributedModelParallel will shard: it allocates the shards and fills them by the tables' ``init_fn``, and
            would lose what an unsharded table holds.
        seed: makes the first values reproducible without touching the global generator.

    Raises:
        ConfigError: no task, a task or a feature that the schema lacks, a table that cannot be built,
            activations to clip where there are none.
    """
    known = [task.name for task in schema.tasks]
    if not tasks:
        raise ConfigError("tasks: a model predicts at least one; name one")
    for task in tasks:
        if task not in known:
            raise ConfigError(f"tasks: {task!r} is not in the schema{nearest(task, known)}")
        if tasks.count(task) > 1:
            raise ConfigError(f"tasks: {task!r} stands twice; name it once")
    config.check(schema, tasks)
    config = scaled(config)
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        if device is not None:
            stack.enter_context(device)
        model: Model = MODELS.build(config, schema, tasks, embedding_device=embedding_device)
    if config.activation_clip is not None:
        clip_activations(model, config.activation_clip, str(vars(config)["type"]))
    return model
