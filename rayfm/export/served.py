"""A trained model as a served one: unsharded, without anything that objectives own, probabilities out.

Shape letters: B examples, H width of the representation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rayfm.config import SnapshotError
from rayfm.data.batch import Batch
from rayfm.export.calibrator import Calibrator
from rayfm.models.base import Model, ModelConfig, ModelOutput
from rayfm.models.build import build_model
from rayfm.schema import Schema

IDS_PREFIX = "ids."
"""``ids.<table>``: ids with rows of their own. What encodes the requests reads them; the model has rows alone."""

CALIBRATOR_PREFIX = "calibrator."
"""A snapshot's tensors are named as in the model's ``state_dict``; those of a calibrator have this before theirs."""


class ServedModel(nn.Module):
    """``Batch -> {task: [B]}``: a probability for a binary task, for a regression the value on its training scale.

    Args:
        model: an unsharded model.
        calibrator: corrects the logits; without one they are the model's own.
    """

    def __init__(self, model: Model, calibrator: Calibrator | None = None) -> None:
        super().__init__()
        self.model = model
        self.calibrator = calibrator

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """Task -> ``[B]``: calibrated logits of binary tasks, values of regressions."""
        logits: dict[str, Tensor] = self.model(batch).logits
        return logits if self.calibrator is None else self.calibrator(logits)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return probabilities(self.model.schema, self.logits(batch))

    def predict(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Predictions as ``forward``'s, and the representation ``[B, H]`` that they come from: one pass for both."""
        output: ModelOutput = self.model(batch)
        logits = output.logits if self.calibrator is None else self.calibrator(output.logits)
        return probabilities(self.model.schema, logits), output.representation

    def tensors(self) -> dict[str, Tensor]:
        """What a snapshot holds: ``export_model`` builds an equal model from it."""
        tensors: dict[str, Tensor] = dict(self.model.state_dict())
        if self.calibrator is not None:
            tensors |= {CALIBRATOR_PREFIX + name: value for name, value in self.calibrator.state_dict().items()}
        return tensors


def probabilities(schema: Schema, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits as predictions: the sigmoid for binary tasks, regressions as they are."""
    return {task: z.sigmoid() if schema.task(task).kind == "binary" else z for task, z in logits.items()}


def export_model(
    model_config: ModelConfig, schema: Schema, tasks: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> ServedModel:
    """Build the served model from a snapshot, in evaluation mode and without gradients.

    The tensors become the model's own, without a copy: a table is in memory once.

    Args:
        model_config: the config that the model was trained with.
        schema: the schema that it was trained with.
        tasks: its tasks.
        tensors: name -> tensor on the device to serve from; names as in the model's ``state_dict``, and
            ``calibrator.<task>.*`` where the snapshot has a calibrator.

    Raises:
        SnapshotError: a tensor is missing, is not the model's, or has another shape.
        ConfigError: the config does not fit the schema.
    """
    # The tables are on meta, as their values come from the snapshot; the small dense layers are built as usual, so that
    # constants which no snapshot holds keep their values.
    model = build_model(model_config, schema, tasks, embedding_device=torch.device("meta"))
    tensors = {name: value for name, value in tensors.items() if not name.startswith(IDS_PREFIX)}
    own = {name: value for name, value in tensors.items() if not name.startswith(CALIBRATOR_PREFIX)}
    _assign(model, own)
    calibrator = None
    if len(own) < len(tensors):
        calibrator = Calibrator(schema, tasks)
        _assign(calibrator, {n.removeprefix(CALIBRATOR_PREFIX): v for n, v in tensors.items() if n not in own})
    served = ServedModel(model, calibrator)
    served.requires_grad_(False)
    return served.eval()


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"lacks {_names(missing)}"] if missing else []
        parts += [f"has {_names(unexpected)}, which the model has not"] if unexpected else []
        raise SnapshotError(f"the snapshot {' and '.join(parts)}; load it with the config it was published with")
    for name, value in tensors.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            raise SnapshotError(
                f"tensor {name!r} is {value.dtype} {list(value.shape)} in the snapshot, the model's is "
                f"{expected[name].dtype} {list(expected[name].shape)}; load it with the config it was published with"
            )
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
