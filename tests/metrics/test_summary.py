"""summary.json from entries of known contents."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from rayfm.metrics import Comparison, Entry, MetricState, lines, summarise
from rayfm.metrics.intervals import estimate, p_value

TRAFFICS = ("feed", "search")
N = 1500
PERIODS = ("2024-01-01", "2024-01-02")
SEEDS = (0, 1, 2)
NOISE = {("fm", "none"): 1.0, ("fm", "direct"): 0.6, ("fm", "aux"): 0.98, ("big", "teacher"): 0.2}
"""Standard deviation of what each model adds to the true logit."""


def world(period: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """True logit, label, user, traffic of a period."""
    g = torch.Generator().manual_seed(PERIODS.index(period) + 1)
    z = torch.randn(N, generator=g) - 1
    return (
        z,
        (torch.rand(N, generator=g) < z.sigmoid()).float(),
        torch.randint(0, 300, (N,), generator=g),
        torch.randint(0, 2, (N,), generator=g),
    )


def predict(model: str, variant: str, seed: int, period: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(model) + 17 * len(variant) + 101 * seed + 1009 * PERIODS.index(period))
    return world(period)[0] + NOISE[model, variant] * torch.randn(N, generator=g)


def scored(model: str, variant: str, seed: int, period: str, replicates: int = 100) -> Entry:
    z, label, user, traffic = world(period)
    prediction = predict(model, variant, seed, period)
    ones = torch.ones(N)
    state = MetricState([("click", "binary"), ("watch", "regression")], TRAFFICS, replicates)
    state.update("click", 0, prediction, label, ones.bool(), ones, traffic, user)
    state.update("watch", 0, prediction, z, ones.bool(), ones, traffic, user)
    state.update("click", 1, prediction, z.sigmoid(), user < 100, ones, traffic, user)
    return Entry(model, variant, seed, period, state, {"click": 0.25})


def entries(variants: tuple[tuple[str, str], ...] = tuple(NOISE), seeds: tuple[int, ...] = SEEDS) -> Iterator[Entry]:
    for model, variant in variants:
        for seed in (0,) if variant == "teacher" else seeds:
            for period in PERIODS:
                yield scored(model, variant, seed, period)


@pytest.fixture(scope="module")
def summary() -> dict[str, list[dict[str, object]]]:
    return summarise(entries())


def find(rows: list[dict[str, object]], **wanted: object) -> dict[str, object]:
    wanted = {"kind": "impression", "task": "click", **wanted}
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


def test_is_json_without_nan(summary: dict[str, list[dict[str, object]]]) -> None:
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["periods"] == list(PERIODS)
    assert summary["tasks"] == [{"name": "click", "kind": "binary"}, {"name": "watch", "kind": "regression"}]


def test_values_are_means_over_seeds_of_pooled_rows(summary: dict[str, list[dict[str, object]]]) -> None:
    label = torch.cat([world(period)[1] for period in PERIODS]).numpy()
    base = np.full(len(label), label.mean())
    losses, aucs, daily = [], [], []
    for seed in SEEDS:
        parts = [predict("fm", "direct", seed, period).double().sigmoid().numpy() for period in PERIODS]
        losses.append(log_loss(label, np.concatenate(parts)))
        aucs.append(roc_auc_score(label, np.concatenate(parts)))
        daily += [roc_auc_score(world(period)[1], part) for period, part in zip(PERIODS, parts, strict=True)]
    expected = {
        "logloss": np.mean(losses),
        "ne": np.mean(losses) / log_loss(label, base),
        "ne_train": np.mean(losses) / -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)),
        "auc": np.mean(aucs),
        "auc_daily": np.mean(daily),
    }
    for metric, value in expected.items():
        row = find(summary["metrics"], model="fm", variant="direct", metric=metric)
        assert row["value"] == pytest.approx(value, abs=1e-4)
        assert row["lo"] < row["value"] < row["hi"]
        assert (row["n"], row["seeds"], row["traffic"]) == (2 * N, 3, "all")


def test_differences_are_paired(summary: dict[str, list[dict[str, object]]]) -> None:
    row = find(summary["differences"], model="fm", variant="direct", metric="ne")
    none, direct = (find(summary["metrics"], model="fm", variant=v, metric="ne") for v in ("none", "direct"))
    assert row["difference"] == pytest.approx(direct["value"] - none["value"])
    assert row["hi"] < 0
    assert row["reference"] == "none"
    assert row["reason"] is None
    # Pairing makes the interval of the difference narrower than two unpaired ones would.
    assert row["hi"] - row["lo"] < np.hypot(direct["hi"] - direct["lo"], none["hi"] - none["lo"])
    assert {(row["model"], row["variant"]) for row in summary["differences"]} == {("fm", "direct"), ("fm", "aux")}


def test_transfer_ratio(summary: dict[str, list[dict[str, object]]]) -> None:
    row = find(summary["transfer_ratio"], model="fm", variant="direct")
    none, direct, teacher = (
        find(summary["metrics"], model=m, variant=v, metric="ne")["value"]
        for m, v in (("fm", "none"), ("fm", "direct"), ("big", "teacher"))
    )
    assert row["value"] == pytest.approx((none - direct) / (none - teacher))
    assert 0 < row["lo"] < row["value"] < row["hi"] < 1
    assert (row["teacher"], row["reference"], row["reason"]) == ("big", "none", None)


def test_considerations_have_soft_labels(summary: dict[str, list[dict[str, object]]]) -> None:
    row = find(summary["metrics"], model="fm", variant="none", kind="consideration", metric="calibration")
    top, bottom = [], []
    for period in PERIODS:
        z, _, user, _ = world(period)
        top += [predict("fm", "none", seed, period).sigmoid()[user < 100].sum() for seed in SEEDS]
        bottom.append(z.sigmoid()[user < 100].sum())
    assert row["value"] == pytest.approx(float(sum(top) / 3 / sum(bottom)), rel=1e-5)
    assert row["n"] == sum(int((world(period)[2] < 100).sum()) for period in PERIODS)


def test_traffics_and_curves(summary: dict[str, list[dict[str, object]]]) -> None:
    rows = [find(summary["traffic"], model="big", variant="teacher", traffic=t, metric="auc") for t in TRAFFICS]
    assert sum(row["n"] for row in rows) == 2 * N
    assert all("lo" not in row for row in rows)
    curve = find(summary["calibration_curves"], model="fm", variant="none")
    assert len(curve["prediction"]) == 20
    assert curve["prediction"] == sorted(curve["prediction"])
    assert sum(curve["weight"]) == pytest.approx(3 * 2 * N)
    label = float(torch.cat([world(period)[1] for period in PERIODS]).mean())
    assert np.average(curve["label"], weights=curve["weight"]) == pytest.approx(label)
    mean = np.mean([float(predict("fm", "none", s, p).sigmoid().mean()) for s in SEEDS for p in PERIODS])
    assert np.average(curve["prediction"], weights=curve["weight"]) == pytest.approx(mean, rel=1e-3)


def test_regressions_have_rmse_alone(summary: dict[str, list[dict[str, object]]]) -> None:
    metrics = {row["metric"] for row in summary["metrics"] if row["task"] == "watch"}
    assert metrics == {"rmse", "calibration"}
    assert not [row for row in summary["transfer_ratio"] if row["task"] == "watch"]


def test_one_seed_says_so() -> None:
    alone = summarise(entries((("fm", "none"), ("fm", "direct")), seeds=(0,)))
    row = find(alone["differences"], model="fm", variant="direct", metric="ne")
    assert row["seeds"] == 1
    assert row["lo"] < row["difference"] < row["hi"]
    assert (
        find(alone["transfer_ratio"], model="fm", variant="direct")["reason"] == "no teacher was scored on these rows"
    )


def test_reasons() -> None:
    def reason(items: list[Entry], **arguments: object) -> object:
        return find(summarise(items, **arguments)["transfer_ratio"], model="fm", variant="direct")["reason"]

    none, direct = scored("fm", "none", 0, PERIODS[0]), scored("fm", "direct", 0, PERIODS[0])
    teacher = scored("big", "teacher", 0, PERIODS[0])
    assert reason([none, direct, teacher]) is None
    assert "no variant 'none'" in str(reason([direct, teacher]))
    assert "different rows" in str(reason([none, direct, scored("big", "teacher", 0, PERIODS[1])]))
    assert "no seed in common" in str(reason([scored("fm", "none", 5, PERIODS[0]), direct, teacher]))
    other = Entry("other", "teacher", 0, PERIODS[0], scored("fm", "none", 1, PERIODS[0]).state)
    assert "several teachers" in str(reason([none, direct, teacher, other]))
    assert reason([none, direct, teacher, other], teacher={"fm": "big"}) is None
    weak = Entry("weak", "teacher", 0, PERIODS[0], none.state)
    assert "not ahead" in str(reason([none, direct, weak]))
    barely = scored("fm", "aux", 0, PERIODS[0]).state
    close = Entry("close", "teacher", 0, PERIODS[0], barely)
    assert reason([none, direct, close]) in (
        "the denominator's interval includes zero",
        "the teacher is not ahead of the undistilled student",
    )
    quick = [
        scored(*name, 0, PERIODS[0], replicates=0) for name in (("fm", "none"), ("fm", "direct"), ("big", "teacher"))
    ]
    assert "no bootstrap replicates" in str(reason(quick))
    assert find(summarise(quick)["metrics"], model="fm", variant="none", metric="ne")["lo"] is None


def test_a_period_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        summarise([scored("fm", "none", 0, PERIODS[0])] * 2)


def test_lines() -> None:
    entry = scored("fm", "none", 0, PERIODS[0])
    rows = lines(entry.state, entry.period, "fm", "none", 0, {"click": 0.25})
    assert list(rows[0]) == ["period", "model", "variant", "seed", "traffic", "kind", "task", "metric", "value", "n"]
    assert len(rows) == 3 * 6 + 3 * 2 + 3 * 6
    json.dumps(rows, allow_nan=False)
    single = MetricState([("click", "binary")], ["all"], 0)
    ones = torch.ones(4)
    single.update("click", 0, ones, torch.tensor([0.0, 1, 0, 1]), ones.bool(), ones, ones.long() * 0, ones.long())
    assert {row["traffic"] for row in lines(single, "p", "m", "none", 0)} == {"all"}


def test_comparison_is_the_summary_pair_by_pair(summary: dict[str, list[dict[str, object]]]) -> None:
    comparison = Comparison(entries())
    direct = comparison.difference(("fm", "direct"), ("fm", "none"), "ne", "click")
    assert direct is not None
    row = find(summary["differences"], model="fm", variant="direct", metric="ne")
    assert estimate(direct).value == pytest.approx(row["difference"])
    assert (estimate(direct).lo, estimate(direct).hi) == (pytest.approx(row["lo"]), pytest.approx(row["hi"]))
    assert p_value(direct) < 0.05
    # Any two variants pair, not only with the reference.
    other = comparison.difference(("fm", "direct"), ("fm", "aux"), "ne", "click", "consideration")
    assert other is not None
    assert estimate(other).value < 0
    value = comparison.value("fm", "none", "auc", "click")
    assert value is not None
    assert value.value == pytest.approx(find(summary["metrics"], model="fm", variant="none", metric="auc")["value"])
    assert comparison.value("fm", "gone", "auc", "click") is None
    relative = comparison.relative_difference(("fm", "direct"), ("fm", "none"), "ne", "click")
    assert relative is not None
    per_seed = [comparison._samples["fm", "none", "impression", "click"]["ne"][seed] for seed in SEEDS]
    base = np.array([sample.points[0] for sample in per_seed])
    assert relative.points == pytest.approx(direct.points / base)
    assert relative.replicates[1] == pytest.approx(direct.replicates[1] / per_seed[1].replicates[0])
    assert comparison.relative_difference(("fm", "direct"), ("fm", "gone"), "ne", "click") is None
    assert comparison.difference(("fm", "direct"), ("big", "none"), "ne", "click") is None
