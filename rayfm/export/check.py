"""Comparing an exported model with the trained one.

Shape letters: B examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayfm.export.config import Form, FormCheck, Tolerance
from rayfm.export.forms import Predict
from rayfm.export.rows import CheckRows
from rayfm.export.served import ServedModel, probabilities
from rayfm.schema import Schema

SIZES = (1, 7)
"""Numbers of first rows that are also predicted alone: code made for one number of rows would show."""


def difference(expected_B: Tensor, found_B: Tensor, binary: bool) -> float:
    """The largest absolute difference; of a regression, over the largest absolute expected value where that is over 1.

    NaN where a value is not finite.
    """
    largest = float((expected_B.double() - found_B.double()).abs().max())
    return largest if binary else largest / max(1.0, float(expected_B.double().abs().max()))


def calibration_shift(expected_B: Tensor, found_B: Tensor) -> float:
    """Mean prediction over mean expected prediction, minus 1; 0 where both are the same, if only zeros."""
    found, expected = float(found_B.double().mean()), float(expected_B.double().mean())
    if found == expected:
        return 0.0
    return found / expected - 1 if expected else math.inf


def expected_predictions(served: ServedModel, rows: CheckRows) -> dict[str, Tensor]:
    """What the trained model predicts of the rows, through the calibrator that is served with it."""
    with torch.no_grad():
        logits = rows.logits if served.calibrator is None else served.calibrator(rows.logits)
    return probabilities(served.model.schema, logits)


def check_form(
    form: Form,
    predict: Predict,
    inputs: tuple[Tensor, ...],
    expected: Mapping[str, Tensor],
    schema: Schema,
    tasks: Sequence[str],
    tolerance: Tolerance,
) -> FormCheck:
    """Compare one form with the trained model on all rows, and on the first few alone.

    Args:
        form: says which tolerance holds.
        predict: the form.
        inputs: the ports' tensors of B rows.
        expected: task -> ``[B]``.
        schema: says which tasks are binary.
        tasks: in the order of what ``predict`` gives.
        tolerance: what is let pass.
    """
    largest = dict.fromkeys(tasks, 0.0)
    shifts: dict[str, float] = {}
    total = int(inputs[0].shape[0])
    with torch.inference_mode():
        for rows in (total, *(size for size in SIZES if size < total)):
            found = dict(zip(tasks, predict(*(x[:rows] for x in inputs)), strict=True))
            for task in tasks:
                binary = schema.task(task).kind == "binary"
                far = difference(expected[task][:rows], found[task], binary)
                largest[task] = far if math.isnan(far) else max(largest[task], far)
                if binary and rows == total:
                    shifts[task] = calibration_shift(expected[task], found[task])
    passed = all(far <= tolerance.difference(form) for far in largest.values())
    passed = passed and all(abs(shift) <= tolerance.calibration for shift in shifts.values())
    return FormCheck(difference=_finite(largest), calibration=_finite(shifts), passed=passed)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
