"""Which considerations a model trains on, and with what weight: sampling policies (UKDSL section 5 leaves this open).

A policy gives every consideration of a period a probability; a row is chosen where a hash of its example id, uniform in
[0, 1), lies below it. What a probability needs to know of a whole period (a budget's factor, the mean of an importance)
is the same sum over the same lane files in every process, so that the choice depends on no number of workers.

With ``reweight`` a chosen row's weight is multiplied by the inverse of its probability (Horvitz and Thompson 1952).
Over the hash, the weighted SUM of any function of a row then has the expectation of the plain sum over all rows that
could be chosen. What follows from such sums by division (a loss is a weighted mean) has a bias that falls with the
number of rows, and an optimiser that scales gradients (Adam, Adagrad) adds its own.

Shape letters: N considerations of a period, n rows of a part of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Discriminator, Field, Tag, model_validator

from rayfm.config import Config, DataError, nearest

Floats: TypeAlias = npt.NDArray[np.float64]
Parts: TypeAlias = Callable[[], Iterator[pa.Table]]
"""Walks through a policy's columns of a period's N considerations, always in the same order."""

STAGE, RANK = "stage_reached", "rank"

Share = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the probabilities of a period's rows have in common."""

    factor: float = 1.0
    """On the wanted shares; infinite where every row that wants any is certain."""
    mean: float = 1.0
    """Of the importance, where a policy has one."""


class BudgetConfig(Config):
    """How many considerations of a period a model may train on, in expectation: one of the two."""

    per_impression: float | None = Field(None, gt=0)
    """Considerations for each impression of the period."""
    per_period: float | None = Field(None, gt=0)
    """Considerations of a period, whatever its impressions."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.per_impression is None) == (self.per_period is None):
            raise ValueError("give one of per_impression and per_period")
        return self

    def rows(self, impressions: int) -> float:
        """Considerations of a period that has so many impressions."""
        return float(self.per_period) if self.per_period is not None else impressions * float(self.per_impression or 0)


class SamplingPolicy(Config):
    """Base of the policies. Each row wants a share; a budget scales the shares of all rows down by one factor."""

    budget: BudgetConfig | None = None
    """Where the shares choose more than this, they are scaled down until the expected number is met."""
    reweight: bool = False
    """Multiply a chosen row's ``sampling_weight`` by the inverse of its probability, so that the expected sum of the
    loss is that of all considerations that want a share above 0."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the example store that the shares are made of."""
        return ()

    @property
    def nothing(self) -> bool:
        """Whether no row can be chosen."""
        return False

    def wanted(self, table: pa.Table, scale: Scale) -> Floats:
        """The share that each row wants, before any budget: ``[n]``, of n rows of ``columns``.

        Raises:
            DataError: a row has no stage, rank or number that a share could be made of.
        """
        raise NotImplementedError

    def total(self, parts: Parts, considerations: int) -> float:
        """Sum of what all N rows want."""
        return math.fsum(float(self.wanted(part, Scale()).sum()) for part in parts())

    def limit(self, impressions: int) -> float:
        """The budget's number of considerations; infinite where there is none."""
        return math.inf if self.budget is None else self.budget.rows(impressions)

    def scale(self, parts: Parts, impressions: int, considerations: int) -> Scale:
        """What the probabilities need to know of a period; without a budget nothing is read for it."""
        limit = self.limit(impressions)
        total = 0.0 if math.isinf(limit) else self.total(parts, considerations)
        return Scale(1.0 if total <= limit else limit / total)

    def probability(self, table: pa.Table, scale: Scale) -> Floats:
        """The probability that each of n rows is chosen: ``min(1, factor * share)``, ``[n]``."""
        share = self.wanted(table, scale)
        return (share > 0).astype(np.float64) if math.isinf(scale.factor) else np.minimum(1.0, scale.factor * share)


class UniformSampling(SamplingPolicy):
    """Every consideration with the same probability. A number in a policy's place is this share."""

    type: Literal["uniform"] = "uniform"
    share: float = Field(ge=0, le=1)

    @property
    def nothing(self) -> bool:
        return self.share == 0

    def wanted(self, table: pa.Table, scale: Scale) -> Floats:
        return np.full(table.num_rows, self.share)

    def total(self, parts: Parts, considerations: int) -> float:
        return self.share * considerations


class ByStageSampling(SamplingPolicy):
    """A share for each stage that a consideration reached."""

    type: Literal["by_stage"] = "by_stage"
    shares: dict[str, Share] = Field(min_length=1)
    """``stage_reached`` -> share. Every stage that the considerations have must be named; 0 leaves it out."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (STAGE,)

    @property
    def nothing(self) -> bool:
        return not any(self.shares.values())

    def wanted(self, table: pa.Table, scale: Scale) -> Floats:
        words, place = _stages(table, list(self.shares), "shares")
        found: Floats = np.array([self.shares[word] for word in words], np.float64)[place]
        return found


class BandConfig(Config):
    """Ranks of one stage that have one share."""

    through: int | None = Field(None, gt=0)
    """The band's last rank; left out in a stage's last band, which takes all that is left."""
    share: Share


class ByRankSampling(SamplingPolicy):
    """Shares by bands of the rank within the stage that a consideration reached: near its cut, far from it."""

    type: Literal["by_rank"] = "by_rank"
    bands: dict[str, Annotated[tuple[BandConfig, ...], Field(min_length=1)]] = Field(min_length=1)
    """``stage_reached`` -> bands in the order of ranks. Every stage that the considerations have must be named."""

    @model_validator(mode="after")
    def _cover(self) -> Self:
        for stage, bands in self.bands.items():
            *inner, last = [band.through for band in bands]
            if last is not None:
                raise ValueError(f"bands.{stage}: ranks after {last} have no share; add a last band without 'through'")
            ends = [end for end in inner if end is not None]
            if len(ends) < len(inner) or any(a >= b for a, b in itertools.pairwise(ends)):
                raise ValueError(f"bands.{stage}: 'through' must stand in all bands but the last, and rise")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return (STAGE, RANK)

    @property
    def nothing(self) -> bool:
        return not any(band.share for bands in self.bands.values() for band in bands)

    def wanted(self, table: pa.Table, scale: Scale) -> Floats:
        words, place = _stages(table, list(self.bands), "bands")
        if table[RANK].null_count:
            raise DataError(f"consideration_share: {table[RANK].null_count} considerations have no {RANK!r}")
        rank = table[RANK].to_numpy()
        found = np.empty(table.num_rows, np.float64)
        for position, word in enumerate(words):
            mine, bands = place == position, self.bands[word]
            ends = [band.through or 0 for band in bands[:-1]]
            share = np.array([band.share for band in bands], np.float64)
            found[mine] = share[np.searchsorted(ends, rank[mine], "left")]
        return found


class ImportanceSampling(SamplingPolicy):
    """Probabilities proportional to a column, with inverse-probability weights.

    The importance v of a row is ``|column - minus| ** power``. With d = ``defensive`` the row wants the share
    ``share * ((1 - d) * v / mean(v) + d)``, cut at 1, and one factor makes the expected number ``share`` of the
    considerations, or the budget where that is less. The even part is a defensive mixture (Hesterberg 1995): no
    probability falls below d times that of uniform sampling of the same expected number, and no weight exceeds 1/d
    times its weight. Weights are never cut, so that bounding them costs no bias.
    """

    type: Literal["importance"] = "importance"
    share: float = Field(1.0, gt=0, le=1)
    """Share of all considerations to expect."""
    column: str
    """``logged/<model>/<task>``, ``rank`` or another numeric column. A row where it is null has importance 0."""
    minus: str | None = None
    """The importance is the distance between ``column`` and this one, such as another stage's prediction."""
    power: float = 1.0
    """Below 0 for more of the small values: -1 with ``column: rank`` is 1 / rank."""
    defensive: float = Field(0.1, gt=0, le=1)
    """Part of the choice that is even."""
    reweight: bool = True
    """As for every policy; here the default."""

    @model_validator(mode="after")
    def _fair(self) -> Self:
        for name in (self.column, self.minus or ""):
            if name.startswith("truth/"):
                raise ValueError(
                    f"{name!r} is the simulator's truth, which only evaluation reads; take a logged column"
                )
        if self.minus == self.column:
            raise ValueError("minus is column itself, so that every importance is 0; name another, or leave it out")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.minus is None else (self.column, self.minus)

    def importance(self, table: pa.Table) -> Floats:
        """v of n rows, ``[n]``.

        Raises:
            DataError: a column is no number, or a value has no such power.
        """
        values = [_numbers(table, name) for name in self.columns]
        value = values[0] if self.minus is None else np.abs(values[0] - values[1])
        known = np.isfinite(value)
        if (value[known] < 0).any() or (self.power < 0 and (value[known] == 0).any()):
            raise DataError(
                f"consideration_share: {self.column!r} is {value[known].min():g} in a consideration, and no importance "
                f"can be made of it with power {self.power:g}; take another column or power"
            )
        found = np.zeros(len(value))
        found[known] = value[known] ** self.power
        return found

    def wanted(self, table: pa.Table, scale: Scale) -> Floats:
        return self.share * ((1 - self.defensive) / scale.mean * self.importance(table) + self.defensive)

    def scale(self, parts: Parts, impressions: int, considerations: int) -> Scale:
        mean = math.fsum(float(self.importance(part).sum()) for part in parts()) / considerations
        if not mean > 0:
            raise DataError(
                f"consideration_share: no consideration has an importance above 0 by {self.column!r} (null counts as "
                "0); take another column"
            )
        expected = min(self.share * considerations, self.limit(impressions))
        if expected >= considerations:
            return Scale(math.inf, mean)
        unscaled = Scale(mean=mean)
        return Scale(capped_factor(lambda: (self.wanted(part, unscaled) for part in parts()), expected), mean)


def _chosen_type(value: Any) -> str | None:
    """Which member of ``ConsiderationShare`` a value is meant to be."""
    if isinstance(value, dict):
        return value.get("type")
    return str(vars(value)["type"]) if isinstance(value, SamplingPolicy) else "float"


ConsiderationShare = Annotated[
    Annotated[Share, Tag("float")]
    | Annotated[UniformSampling, Tag("uniform")]
    | Annotated[ByStageSampling, Tag("by_stage")]
    | Annotated[ByRankSampling, Tag("by_rank")]
    | Annotated[ImportanceSampling, Tag("importance")],
    Discriminator(_chosen_type),
]
"""A policy by its ``type``, or a number: the share of uniform sampling."""


def policy_of(share: float | SamplingPolicy) -> SamplingPolicy:
    """The policy that a configured share stands for."""
    return share if isinstance(share, SamplingPolicy) else UniformSampling(share=share)


def capped_factor(parts: Callable[[], Iterator[Floats]], expected: float) -> float:
    """The c for which ``sum(min(1, c * share))`` is ``expected``; infinite where that is every row.

    A row whose ``c * share`` passes 1 is certain, and the others share what is left; so c rises from
    ``expected / sum`` until no further row passes 1.

    Args:
        parts: walks through the shares of all rows, each above 0; called a few times.
        expected: the expected number of rows.
    """
    certain, factor = -1, 0.0
    while True:
        count, rest = 0, 0.0
        for shares in parts():
            over = factor * shares >= 1.0
            count += int(over.sum())
            rest += float(shares[~over].sum())
        if rest <= 0:
            return math.inf
        if count == certain or count >= expected:
            return factor
        certain, factor = count, (expected - count) / rest


def _stages(table: pa.Table, known: list[str], key: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The stages that the rows reached, each once, and the position ``[n]`` of each row's among them."""
    column = table[STAGE]
    if column.null_count:
        raise DataError(f"consideration_share: {column.null_count} considerations have no {STAGE!r}")
    words = pc.unique(column)
    names: list[str] = words.to_pylist()
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise DataError(
            f"consideration_share.{key}: considerations reached stage {strange!r}, which has no share"
            f"{nearest(strange, known)}; add it, with 0 to leave its rows out"
        )
    return names, pc.index_in(column, value_set=words).to_numpy().astype(np.int64)


def _numbers(table: pa.Table, name: str) -> Floats:
    """A column as ``[n]`` float64, not a number where it is null."""
    column = table[name]
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DataError(f"consideration_share: column {name!r} is {column.type}; an importance needs numbers")
    numbers: Floats = pc.cast(column, pa.float64()).to_numpy()
    return numbers
