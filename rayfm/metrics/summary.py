"""From gathered sums to what a run writes: lines of ``metrics.jsonl``, and ``summary.json``."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from rayfm.metrics.intervals import CONFIDENCE, Estimate, Sample, estimate, ratio_estimate
from rayfm.metrics.pool import Pool, calibration_curve
from rayfm.metrics.state import SCORED, SUMS, MetricState, TaskKind
from rayfm.schema import KINDS

LOWER_IS_BETTER = frozenset({"ne", "ne_train", "logloss", "rmse", "miscalibration"})
"""Metrics that a better model has less of."""

ALL_TRAFFIC = "all"
TEACHER = "teacher"
"""The variant of a teacher's own entries."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model's sums over one test period."""

    model: str
    variant: str
    seed: int
    period: str
    state: MetricState
    train_rate: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Task -> mean label of what the model was trained on before the period, for ``ne_train``."""


Row: TypeAlias = dict[str, Any]
_Key: TypeAlias = tuple[str, str, str, str]
"""Model, variant, kind, task."""


def _plain(value: float) -> float | None:
    """A number that JSON has."""
    return float(value) if math.isfinite(value) else None


def lines(
    state: MetricState,
    period: str,
    model: str,
    variant: str,
    seed: int,
    train_rate: Mapping[str, float] | None = None,
) -> list[Row]:
    """One line of ``metrics.jsonl`` per kind, task, traffic and metric, for the kinds and traffics that have rows.

    ``value`` is None where a metric is undefined (one class alone; ``ne_train`` without a ``train_rate``).
    """
    rows: list[Row] = []
    for number, kind in enumerate(SCORED):
        for task, task_kind in state.tasks.items():
            cell = state.cell(number, task)
            if not float(cell.sums[:, SUMS.index("n")].sum()):
                continue
            pool = Pool(task_kind)
            pool.add(period, cell, (train_rate or {}).get(task, math.nan))
            head = {"period": period, "model": model, "variant": variant, "seed": seed}
            pooled = {name: value for name, value in pool.points().items() if name != "auc_daily"}
            parts = [(ALL_TRAFFIC, float(pool.rows), pooled)]
            counts, values = pool.by_traffic()
            if len(state.traffics) > 1:
                parts += [
                    (traffic, float(counts[i]), {name: float(value[i]) for name, value in values.items()})
                    for i, traffic in enumerate(state.traffics)
                    if counts[i]
                ]
            for traffic, count, metrics in parts:
                where = {"traffic": traffic, "kind": kind, "task": task}
                rows += [
                    {**head, **where, "metric": name, "value": _plain(value), "n": round(count)}
                    for name, value in metrics.items()
                ]
    return rows


def summarise(
    entries: Iterable[Entry],
    reference_variant: str = "none",
    teacher: str | Mapping[str, str] | None = None,
) -> Row:
    """The content of ``summary.json``: every metric over all test periods, from pooled sums.

    Args:
        entries: in any order; each state is read once, so a generator that loads them keeps memory small.
        reference_variant: the variant that the others of the same model are compared with, paired by user and seed.
        teacher: model name of the teacher, or of each student's teacher; by default the only model of variant
            ``teacher``.

    Returns:
        ``metrics`` (model, variant, kind, task, traffic, metric, value, lo, hi, n, seeds), ``differences``
        (..., difference, lo, hi, reference, seeds), ``transfer_ratio`` (..., value, lo, hi, teacher, reference,
        seeds, reason), ``traffic`` (as ``metrics``, one row a traffic, without intervals), ``calibration_curves``
        (prediction, label, weight), and what they rest on: ``periods``, ``tasks``, ``confidence``, ``replicates``.
        Undefined numbers are None, with a ``reason`` where a comparison has none.
    """
    pools: dict[_Key, dict[int, Pool]] = defaultdict(dict)
    tasks: dict[str, TaskKind] = {}
    traffics: tuple[str, ...] = ()
    replicates = 0
    for entry in entries:
        tasks.update(entry.state.tasks)
        traffics, replicates = entry.state.traffics, entry.state.replicates
        _gather(pools, entry)
    samples = {key: _samples(seeds) for key, seeds in pools.items()}
    periods = sorted({period for seeds in pools.values() for pool in seeds.values() for period in pool.periods})
    return {
        "periods": periods,
        "tasks": [{"name": name, "kind": kind} for name, kind in tasks.items()],
        "traffics": list(traffics),
        "confidence": CONFIDENCE,
        "replicates": replicates,
        "reference_variant": reference_variant,
        "metrics": [row for key, seeds in pools.items() for row in _metric_rows(key, seeds, samples[key])],
        "differences": [row for key in pools for row in _difference_rows(key, pools, samples, reference_variant)],
        "transfer_ratio": [
            row for key in pools for row in _transfer_rows(key, pools, samples, reference_variant, teacher)
        ],
        "traffic": [row for key, seeds in pools.items() for row in _traffic_rows(key, seeds, traffics)],
        "calibration_curves": [
            {**_head(key), **calibration_curve(np.sum([pool.histogram() for pool in seeds.values()], axis=0))}
            for key, seeds in pools.items()
            if tasks[key[3]] == "binary"
        ],
    }


def _gather(pools: dict[_Key, dict[int, Pool]], entry: Entry) -> None:
    """Add an entry's sums, of the kinds and tasks that have rows."""
    for number, kind in enumerate(SCORED):
        for task, task_kind in entry.state.tasks.items():
            cell = entry.state.cell(number, task)
            if float(cell.sums[:, SUMS.index("n")].sum()):
                seeds = pools[entry.model, entry.variant, kind, task]
                pool = seeds.setdefault(entry.seed, Pool(task_kind))
                pool.add(entry.period, cell, entry.train_rate.get(task, math.nan))


class Comparison:
    """Samples of several models over the same rows, to be compared pair by pair.

    Besides the metrics of a summary there is ``miscalibration``, the distance of calibration from 1.

    Args:
        entries: of one run or of several (such as the slides of a split), in any order; each is read once.

    Raises:
        ValueError: a model, variant and seed were scored twice on a period.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._pools: dict[_Key, dict[int, Pool]] = defaultdict(dict)
        for entry in entries:
            _gather(self._pools, entry)
        self._samples = {key: _samples(seeds) for key, seeds in self._pools.items()}
        for samples in self._samples.values():
            if "calibration" in samples:
                samples["miscalibration"] = {
                    seed: Sample(abs(sample.points - 1), abs(sample.replicates - 1))
                    for seed, sample in samples["calibration"].items()
                }

    def value(self, model: str, variant: str, metric: str, task: str, kind: str = KINDS[0]) -> Estimate | None:
        """The metric over all rows, or None where the model was not scored on such rows."""
        samples = self._samples.get((model, variant, kind, task), {}).get(metric)
        return None if samples is None else estimate(_stack(samples, samples))

    def difference(
        self, one: tuple[str, str], other: tuple[str, str], metric: str, task: str, kind: str = KINDS[0]
    ) -> Sample | None:
        """``one`` minus ``other``, each (model, variant), paired by user and seed; None where they do not pair."""
        keys = [(model, variant, kind, task) for model, variant in (one, other)]
        if any(metric not in self._samples.get(key, {}) for key in keys):
            return None
        seeds, reason = _paired(self._pools[keys[0]], self._pools[keys[1]])
        if reason is not None:
            return None
        first, second = (_stack(self._samples[key][metric], seeds) for key in keys)
        return first - second

    def relative_difference(
        self, one: tuple[str, str], other: tuple[str, str], metric: str, task: str, kind: str = KINDS[0]
    ) -> Sample | None:
        """As `difference`, over ``other``'s value: what papers call a relative change."""
        difference = self.difference(one, other, metric, task, kind)
        if difference is None:
            return None
        (first, second), of = (one, other), (kind, task)
        seeds, _ = _paired(self._pools[*first, *of], self._pools[*second, *of])
        base = _stack(self._samples[*second, *of][metric], seeds)
        return Sample(difference.points / base.points, difference.replicates / base.replicates)


_Samples: TypeAlias = dict[str, dict[int, Sample]]
"""Metric -> seed -> that seed's value and replicates (M = 1)."""


def _samples(seeds: Mapping[int, Pool]) -> _Samples:
    samples: _Samples = defaultdict(dict)
    for seed, pool in sorted(seeds.items()):
        replicates = pool.replicates()
        for metric, value in pool.points().items():
            samples[metric][seed] = Sample(np.array([value]), replicates[metric][None])
    return samples


def _stack(samples: Mapping[int, Sample], seeds: Iterable[int]) -> Sample:
    chosen = [samples[seed] for seed in seeds]
    return Sample(np.concatenate([s.points for s in chosen]), np.concatenate([s.replicates for s in chosen]))


def _head(key: _Key) -> Row:
    return dict(zip(("model", "variant", "kind", "task"), key, strict=True))


def _interval(result: Estimate, name: str = "value") -> Row:
    return {name: _plain(result.value), "lo": _plain(result.lo), "hi": _plain(result.hi), "seeds": result.seeds}


def _metric_rows(key: _Key, seeds: Mapping[int, Pool], samples: _Samples) -> list[Row]:
    n = round(float(np.mean([pool.rows for pool in seeds.values()])))
    return [
        {
            **_head(key),
            "traffic": ALL_TRAFFIC,
            "metric": metric,
            **_interval(estimate(_stack(by_seed, by_seed))),
            "n": n,
        }
        for metric, by_seed in samples.items()
    ]


def _traffic_rows(key: _Key, seeds: Mapping[int, Pool], traffics: tuple[str, ...]) -> list[Row]:
    per_seed = [pool.by_traffic() for pool in seeds.values()]
    counts = np.mean([count for count, _ in per_seed], axis=0)
    return [
        {
            **_head(key),
            "traffic": traffic,
            "metric": metric,
            "value": _plain(float(np.mean([values[metric][i] for _, values in per_seed]))),
            "n": round(float(counts[i])),
            "seeds": len(per_seed),
        }
        for i, traffic in enumerate(traffics)
        if counts[i]
        for metric in per_seed[0][1]
    ]


def _paired(seeds: Mapping[int, Pool], reference: Mapping[int, Pool]) -> tuple[list[int], str | None]:
    """Seeds that both were trained with and scored over the same rows, or why there are none."""
    common = sorted(seeds.keys() & reference.keys())
    if not common:
        return [], "no seed in common"
    equal = [seed for seed in common if seeds[seed].periods == reference[seed].periods]
    return equal, None if equal else "scored on different rows"


def _difference_rows(
    key: _Key, pools: Mapping[_Key, dict[int, Pool]], samples: Mapping[_Key, _Samples], reference: str
) -> list[Row]:
    model, variant, kind, task = key
    other = (model, reference, kind, task)
    if variant in (reference, TEACHER) or other not in pools:
        return []
    seeds, reason = _paired(pools[key], pools[other])
    rows: list[Row] = []
    for metric in samples[key]:
        row = {**_head(key), "traffic": ALL_TRAFFIC, "metric": metric, "reference": reference}
        if reason is None:
            difference = _stack(samples[key][metric], seeds) - _stack(samples[other][metric], seeds)
            row |= _interval(estimate(difference), "difference")
        else:
            row |= {"difference": None, "lo": None, "hi": None, "seeds": 0}
        rows.append(row | {"reason": reason})
    return rows


def _transfer_rows(
    key: _Key,
    pools: Mapping[_Key, dict[int, Pool]],
    samples: Mapping[_Key, _Samples],
    reference: str,
    teacher: str | Mapping[str, str] | None,
) -> list[Row]:
    model, variant, kind, task = key
    if variant in (reference, TEACHER) or "ne" not in samples[key]:
        return []
    teachers = list(dict.fromkeys(other[0] for other in pools if other[1] == TEACHER))
    if teacher is None:
        name = teachers[0] if len(teachers) == 1 else None
    else:
        name = teacher if isinstance(teacher, str) else teacher.get(model)
    row: Row = {**_head(key), "traffic": ALL_TRAFFIC, "teacher": name, "reference": reference}

    def none(reason: str) -> list[Row]:
        return [row | {"value": None, "lo": None, "hi": None, "seeds": 0, "reason": reason}]

    none_key, teacher_key = (model, reference, kind, task), (name or "", TEACHER, kind, task)
    if none_key not in pools:
        return none(f"no variant {reference!r} of this model")
    if teacher_key not in pools:
        return none("no teacher was scored on these rows" if name or not teachers else "several teachers; name one")
    seeds, reason = _paired(pools[key], pools[none_key])
    if reason is not None:
        return none(reason)
    teacher_pools = pools[teacher_key]
    if any(pool.periods != pools[key][seeds[0]].periods for pool in teacher_pools.values()):
        return none("the teacher was scored on different rows")
    undistilled = _stack(samples[none_key]["ne"], seeds)
    gain = undistilled - _stack(samples[key]["ne"], seeds)
    gap = undistilled - _teacher_of(samples[teacher_key]["ne"], seeds)
    if float(gap.points.mean()) <= 0:
        return none("the teacher is not ahead of the undistilled student")
    result, reason = ratio_estimate(gain, gap)
    return [row | _interval(result) | {"reason": reason}]


def _teacher_of(samples: Mapping[int, Sample], seeds: list[int]) -> Sample:
    """The teacher beside each student's seed: of the same seed, else the mean of the teacher's seeds."""
    everything = _stack(samples, samples)
    mean = Sample(everything.points.mean(keepdims=True), everything.replicates.mean(0, keepdims=True))
    return _stack({seed: samples.get(seed, mean) for seed in seeds}, seeds)
