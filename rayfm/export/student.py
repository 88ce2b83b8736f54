"""A student as it is served: tables merged, calibrator applied, the rest in the fastest form that is right.

Shape letters: B examples, V width of a two-tower's vectors.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from rayfm.config import ConfigError, SnapshotError
from rayfm.data.batch import Batch
from rayfm.export.check import check_form, expected_predictions
from rayfm.export.compiled import Architecture
from rayfm.export.config import CompileConfig, ExportCheck, Form, FormCheck, Tolerance
from rayfm.export.forms import Predict, available_forms, make_form
from rayfm.export.lookup import LookUps
from rayfm.export.ports import DensePart, cut
from rayfm.export.rows import CheckRows
from rayfm.export.served import ServedModel, export_model
from rayfm.models.base import ModelConfig
from rayfm.models.synthetic import synthetic_batch
from rayfm.models.two_tower import TwoTower
from rayfm.schema import Schema

RANDOM_ROWS = 1024
"""Rows of the check where a snapshot has none of its own."""
TIMED = 7
"""Calls of each form, in turns; the shortest counts."""
PUBLISH_FORMS: tuple[Form, ...] = ("eager", "torchscript", "int8")
"""Forms that are checked at publishing: those that need no compiler."""


@dataclasses.dataclass(frozen=True)
class FormResult:
    """What became of a form."""

    check: FormCheck | None
    """None where it could not be made."""
    seconds: float | None
    """Of one request of ``candidates`` rows, without the look-ups; None where it is not right."""
    refused: str | None
    """Why it is not served; None where it could be."""


class ExportedStudent:
    """``Batch -> {task: [B]}``: probabilities of binary tasks, values of regressions on their training scale.

    Made by `export_student`. Safe to call from several threads.

    Attributes:
        form: what the part behind the look-ups runs as.
        results: form -> what became of it.
        tasks: the model's tasks.
        model: the model behind the look-ups, in fp32; its embeddings read no batch any more.
        calibrator: corrects the logits, if the snapshot has one.
    """

    def __init__(
        self, lookups: LookUps, part: DensePart, predict: Predict, form: Form, results: dict[Form, FormResult]
    ) -> None:
        self._lookups, self._part, self._predict = lookups, part, predict
        self.form, self.results = form, results
        self.tasks, self.model, self.calibrator = part.tasks, part.served.model, part.served.calibrator

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions, each float32 ``[B]``.

        Raises:
            DataError: the batch lacks a feature.
        """
        if not len(batch):
            return {task: torch.zeros(0) for task in self.tasks}
        with torch.inference_mode():
            return dict(zip(self.tasks, self._predict(*self._lookups(batch)), strict=True))

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """As `ServedModel.logits`: calibrated logits, each ``[B]``, in fp32 whatever the form."""
        with torch.inference_mode():
            return self._part.served.logits(self._part.values(self._lookups(batch)))

    def predict(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """As `ServedModel.predict`: predictions, and the representation ``[B, H]``, both in fp32 whatever the form."""
        with torch.inference_mode():
            return self._part.served.predict(self._part.values(self._lookups(batch)))

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """User and item vectors of a two-tower, each float32 ``[B, V]``, in fp32 whatever the form.

        Raises:
            ConfigError: the model is none.
        """
        if not isinstance(self.model, TwoTower):
            raise ConfigError(f"a model of type {vars(self.model.config)['type']!r} has no towers; take a two_tower")
        with torch.inference_mode():
            user_BV, item_BV = self.model.vectors(self._part.values(self._lookups(batch)))
        return user_BV, item_BV


def export_student(
    model_config: ModelConfig,
    schema: Schema,
    tasks: tuple[str, ...],
    tensors: dict[str, Tensor],
    config: CompileConfig | None = None,
    rows: CheckRows | None = None,
) -> ExportedStudent:
    """Build a student from a snapshot, in the form that the config names or in the fastest one that is right.

    Args:
        model_config, schema, tasks, tensors: as for `rayfm.export.served.export_model`. ``tensors`` is empty
            afterwards, so that no table is in memory twice.
        config: which forms, and the tolerance.
        rows: real rows with the trained model's logits. Without any, random rows are compared with the same weights in
            fp32.

    Raises:
        SnapshotError: the tensors are not the model's, or no form that is allowed passes the check.
        ConfigError: the named form cannot be made here.
    """
    config = config or CompileConfig()
    forms = available_forms(config)
    served = export_model(model_config, schema, tasks, tensors)
    architecture = Architecture(model_config, schema, tasks, served.calibrator is not None)
    rows = _random_rows(served) if rows is None else rows
    expected = expected_predictions(served, rows)
    lookups, part = _split(served, tensors)
    with torch.inference_mode():
        inputs = lookups(rows.batch)
    made: dict[Form, Predict] = {}
    results: dict[Form, FormResult] = {}
    for form in forms:
        predict, check = _try(form, part, architecture, config, inputs, expected)
        if predict is None:
            results[form] = FormResult(None, None, check.reason)
            continue
        if check.passed:
            made[form] = predict
        results[form] = FormResult(check, None, None if check.passed else f"differs: {check.worst()}")
    if not made:
        why = "; ".join(f"{form} {result.refused}" for form, result in results.items())
        raise SnapshotError(
            f"the exported model does not predict what the trained one did ({why}); raise the tolerance only if that "
            "is what you want to serve"
        )
    if len(made) > 1:
        seconds = _time(made, tuple(_cycle(x, config.candidates) for x in inputs))
        results |= {form: dataclasses.replace(results[form], seconds=seconds[form]) for form in made}
        best = min(made, key=seconds.__getitem__)
    else:
        best = next(iter(made))
    return ExportedStudent(lookups, part, made[best], best, results)


def check_export(
    model_config: ModelConfig,
    schema: Schema,
    tasks: tuple[str, ...],
    tensors: dict[str, Tensor],
    rows: CheckRows,
    period: str,
    tolerance: Tolerance,
) -> ExportCheck:
    """The check at publishing, in the forms that need no compiler; ``tensors`` is empty afterwards.

    Raises:
        SnapshotError: the exported model in fp32 does not run, or does not predict what the trained one did. Another
            form that cannot be made is written down as one that did not pass.
    """
    served = export_model(model_config, schema, tasks, tensors)
    architecture = Architecture(model_config, schema, tasks, served.calibrator is not None)
    expected = expected_predictions(served, rows)
    lookups, part = _split(served, tensors)
    with torch.inference_mode():
        inputs = lookups(rows.batch)
    config = CompileConfig(tolerance=tolerance)
    checks: dict[Form, FormCheck] = {}
    for form in (form for form in PUBLISH_FORMS if form in available_forms(config)):
        checks[form] = _try(form, part, architecture, config, inputs, expected)[1]
    if checks["eager"].reason is not None:
        raise SnapshotError(
            f"the exported model does not run ({checks['eager'].reason}); change the model, of whose batch only "
            "embeddings, dense features and histories are left (docs/extending.md, 'What is left of the batch'); it is "
            "not published"
        )
    if not checks["eager"].passed:
        raise SnapshotError(
            f"the exported model differs from the trained one on {len(rows.batch)} rows of {period}: "
            f"{checks['eager'].worst()} (tolerance {tolerance.exact:g} and {tolerance.calibration:g}); it is not "
            "published"
        )
    return ExportCheck(period=period, rows=len(rows.batch), tolerance=tolerance, forms=checks)


def _try(
    form: Form,
    part: DensePart,
    architecture: Architecture,
    config: CompileConfig,
    inputs: tuple[Tensor, ...],
    expected: dict[str, Tensor],
) -> tuple[Predict | None, FormCheck]:
    """One form and how far it is; None and a check that says why where it cannot be made or run.

    Raises:
        ConfigError: the folder of compiled code cannot be used.
    """
    try:
        predict = make_form(form, part, architecture, config)
        schema = part.served.model.schema
        return predict, check_form(form, predict, inputs, expected, schema, part.tasks, config.tolerance)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # torch has no one class for what it cannot trace or compile
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0] if said else 'no message'}"
        return None, FormCheck(difference={}, calibration={}, passed=False, reason=reason)


def _split(served: ServedModel, tensors: dict[str, Tensor]) -> tuple[LookUps, DensePart]:
    embeddings, dense, part = cut(served)
    tensors.clear()
    return LookUps(embeddings, dense, part.ports, served.model.schema), part.eval()


def _random_rows(served: ServedModel) -> CheckRows:
    batch = synthetic_batch(served.model.schema, RANDOM_ROWS)
    with torch.inference_mode():
        return CheckRows(batch, {task: z.float() for task, z in served.model(batch).logits.items()})


def _cycle(x: Tensor, rows: int) -> Tensor:
    """Exactly ``rows`` rows: the first ones, from the start again where there are too few."""
    return x.index_select(0, torch.arange(rows) % x.shape[0])


def _time(forms: dict[Form, Predict], inputs: tuple[Tensor, ...]) -> dict[Form, float]:
    """Seconds of the shortest of a few calls, in turns, so that what else the machine does meets all of them."""
    shortest = dict.fromkeys(forms, float("inf"))
    with torch.inference_mode():
        for turn in range(TIMED + 2):
            for form, predict in forms.items():
                started = time.perf_counter()
                predict(*inputs)
                if turn >= 2:  # TorchScript optimises in its first two calls
                    shortest[form] = min(shortest[form], time.perf_counter() - started)
    return shortest
