"""How an exported student is compiled, and how far from the trained model it may be. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfm.config import Config

Form = Literal["eager", "torchscript", "int8", "aot_bf16"]
"""What the part of a model behind the look-ups runs as."""

EXACT: tuple[Form, ...] = ("eager", "torchscript")
"""Forms that compute in fp32, as the trained model does in the check."""


class Tolerance(Config):
    """How far the predictions of an exported model may be from those of the trained one, in fp32, on the same rows."""

    exact: float = Field(1e-4, gt=0)
    """Largest absolute difference of a probability in the forms that compute in fp32: rounding of sums in another
    order, and nothing else."""
    reduced: float = Field(0.005, gt=0)
    """Largest absolute difference of a probability in int8 and bf16. Of a regression, in both: the difference over the
    largest absolute prediction of the trained model, or over 1 where that is smaller."""
    calibration: float = Field(0.005, gt=0)
    """Largest shift of the calibration, in every form: mean prediction over the trained model's, minus 1."""

    def difference(self, form: Form) -> float:
        """The largest difference that ``form`` may have."""
        return self.exact if form in EXACT else self.reduced


class CompileConfig(Config):
    """How a student is compiled where it is served."""

    compile: Literal["auto"] | Form = "auto"
    """``auto`` times the forms on the serving machine and keeps the fastest that passes the check; or one form, which
    is refused where it does not pass. ``aot_bf16`` needs a C++ compiler."""
    native: bool = False
    """Whether ``auto`` tries ``aot_bf16`` too: the first version of an architecture that a machine meets then waits for
    the compiler, a minute or so."""
    tolerance: Tolerance = Tolerance()
    """A form further from the trained model is never served."""
    candidates: int = Field(1000, ge=2, le=10_000)
    """Rows of the request that the forms are timed on."""
    cache: str | None = None
    """Folder of compiled code, which only the service may write; by default ``rayfm/compiled`` below the user's cache
    folder (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    compile_limit: float = Field(600.0, gt=0)
    """Seconds that compiling may take."""


class FormCheck(Config):
    """How far the predictions of one form were from the trained model's."""

    difference: dict[str, float | None]
    """Task -> the largest difference, as `Tolerance` measures it; None where a prediction was not finite."""
    calibration: dict[str, float | None]
    """Binary task -> the shift of the calibration."""
    passed: bool
    reason: str | None = None
    """Why the form could not be made or run; it has no figures then."""

    def worst(self) -> str:
        """The figures in words, for messages; without any, why."""
        if self.reason is not None:
            return self.reason
        parts = [f"{task} by {'NaN' if value is None else f'{value:.2g}'}" for task, value in self.difference.items()]
        shifts = [f"{task} {'NaN' if value is None else f'{value:+.2g}'}" for task, value in self.calibration.items()]
        return ", ".join(parts) + (f"; calibration of {', '.join(shifts)}" if shifts else "")


class ExportCheck(Config):
    """What a manifest says of the check at publishing."""

    period: str
    """Where the rows are from."""
    rows: int
    tolerance: Tolerance
    forms: dict[Form, FormCheck]
    """``eager`` had to pass. The others, passed or not, are tried again and timed where the model is served."""
    file: str | None = None
    """The rows with the trained model's logits, beside the tensors: for the check where the model is served."""
