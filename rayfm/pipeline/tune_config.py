"""What `rayfm tune` searches: the ``tune`` section of a config, and the spaces that its values come from."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from rayfm.config import Config, ConfigError, nearest

TuneMetric = Literal["ne", "ne_train", "logloss", "rmse", "auc"]
"""The metrics that have a direction. Calibration has none: it is best at 1."""

_KINDS = ("choice", "uniform", "loguniform", "randint", "lograndint", "quniform", "qrandint")
_CALL = re.compile(r"^\s*([A-Za-z_]+)\s*\((.*)\)\s*$", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Space:
    """Where the values of one key come from: a function of Ray Tune's search space API with its arguments."""

    kind: str
    arguments: tuple[Any, ...]

    def domain(self) -> Any:
        """Ray Tune's domain. A choice is searched by position, since Optuna's categories must be scalars."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(range(len(self.arguments))))
        return getattr(tune, self.kind)(*self.arguments)

    def value(self, sampled: Any) -> Any:
        """The config's value for what was sampled. Numbers are cut to four digits, for people to read and write."""
        if self.kind == "choice":
            return self.arguments[int(sampled)]
        if self.kind.endswith("randint"):
            return int(sampled)
        low, high = self.arguments[:2]
        return min(max(float(f"{float(sampled):.4g}"), float(low)), float(high))

    def examples(self) -> list[Any]:
        """Values that must all be allowed: every choice, or both ends."""
        if self.kind == "choice":
            return list(self.arguments)
        low, high = self.arguments[:2]
        return [low, high - 1 if self.kind in ("randint", "lograndint") else high]


def parse_space(text: str) -> Space:
    """``choice(8, 16)``, ``loguniform(1e-4, 1e-2)``, ... as a `Space`.

    Raises:
        ConfigError: an unknown function, or arguments that it does not take.
    """
    match = _CALL.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is no search space; write e.g. choice(8, 16, 32) or loguniform(1e-4, 1e-2)")
    kind, inner = match.groups()
    if kind not in _KINDS:
        raise ConfigError(f"{text!r}: unknown search space {kind!r}{nearest(kind, list(_KINDS))}")
    try:
        arguments = [_number(item) for item in yaml.safe_load(f"[{inner}]")]
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{text!r}: not valid YAML between the brackets ({getattr(error, 'problem', error)})"
        ) from None
    if kind == "choice":
        if len(arguments) < 2:
            raise ConfigError(f"{text!r}: a choice needs two values or more")
        return Space(kind, tuple(arguments))
    _check_range(text, kind, arguments)
    return Space(kind, tuple(arguments))


def _check_range(text: str, kind: str, arguments: list[Any]) -> None:
    names = ["low", "high", *(["step"] if kind.startswith("q") else [])]
    wanted: tuple[type, ...] = (int,) if "randint" in kind else (int, float)
    if len(arguments) != len(names) or any(isinstance(a, bool) or not isinstance(a, wanted) for a in arguments):
        unit = "whole numbers" if "randint" in kind else "numbers"
        raise ConfigError(f"{text!r}: {kind} takes {', '.join(names)}, which are {unit}")
    low, high = arguments[:2]
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{text!r}: low must be below high")
    if "log" in kind and low <= 0:
        raise ConfigError(f"{text!r}: low must be above 0 on a logarithmic scale")
    if kind.startswith("q") and arguments[2] <= 0:
        raise ConfigError(f"{text!r}: step must be above 0")


def _number(item: Any) -> Any:
    """YAML takes ``1e-4`` for text."""
    if isinstance(item, str):
        try:
            return float(item)
        except ValueError:
            return item
    return item


class TuneConfig(Config):
    """The search of `rayfm tune`: Ray Tune with ASHA, over the warm-up periods alone."""

    parameters: dict[str, str] = {}
    """Config key -> search space: ``choice(a, b, ...)``, or ``uniform``, ``loguniform`` (low, high), ``randint``,
    ``lograndint`` (low, high; high is left out), ``quniform``, ``qrandint`` (low, high, step), as in Ray Tune."""
    model: str | None = None
    """The student or teacher to tune; by default the only one there is."""
    variant: str | None = None
    """Its variant; by default ``evaluation.reference_variant``. A variant that learns from a teacher reads the labels
    that a run of this name has stored."""
    task: str | None = None
    """By default the model's first."""
    metric: TuneMetric = "ne"
    trials: int = Field(16, ge=1)
    """Trials in all, over all resumed searches."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at once; by default as many as fit. The fewer, the more TPE knows when it suggests the next."""
    search: Literal["tpe", "random"] = "tpe"
    """``tpe``: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""
    seed: int = 0
    """Seed of the search; the models have ``seeds``, and a score is their mean."""
    score_from: int = Field(1, ge=1)
    """Position (from 0) of the first period that is scored; those before are only trained on."""
    grace: int = Field(1, ge=1)
    """Scored periods before ASHA (Li et al. 2020) may stop a trial."""
    reduction: int = Field(3, ge=2)
    """ASHA lets about one trial in so many go on from each rung to the next."""

    @field_validator("parameters")
    @classmethod
    def _spaces(cls, parameters: dict[str, str]) -> dict[str, str]:
        for key, text in parameters.items():
            try:
                parse_space(text)
            except ConfigError as error:
                raise ValueError(f"{key}: {error}") from None
        return parameters

    def spaces(self) -> dict[str, Space]:
        """Key -> its space."""
        return {key: parse_space(text) for key, text in self.parameters.items()}
