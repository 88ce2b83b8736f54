"""The gathered sums against plain recomputation, however the rows are split."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from rayfm.config import DataError
from rayfm.metrics import MetricState, RateCounter, bootstrap_weights, lines
from rayfm.metrics.pool import Pool

TASKS = (("click", "binary"), ("watch", "regression"))
TRAFFICS = ("feed", "search", "video")


@dataclasses.dataclass
class Rows:
    prediction: Tensor
    label: Tensor
    mask: Tensor
    weight: Tensor
    traffic: Tensor
    user: Tensor

    def part(self, rows: slice) -> list[Tensor]:
        return [getattr(self, field.name)[rows] for field in dataclasses.fields(self)]


def draw(n: int, seed: int = 0, soft: bool = False, weighted: bool = True) -> Rows:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(n, generator=g) - 1.5
    label = truth.sigmoid() if soft else (torch.rand(n, generator=g) < truth.sigmoid()).float()
    return Rows(
        prediction=truth + 0.5 * torch.randn(n, generator=g),
        label=label,
        mask=torch.rand(n, generator=g) < 0.8,
        weight=torch.rand(n, generator=g) + 0.5 if weighted else torch.ones(n),
        traffic=torch.randint(0, 3, (n,), generator=g),
        user=torch.randint(0, n // 8 + 1, (n,), generator=g),
    )


def small_state() -> MetricState:
    return MetricState(TASKS, TRAFFICS, replicates=20)


def soft_auc(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """scikit-learn's AUC of soft labels: each row stands once as a positive and once as a negative."""
    hard = np.r_[np.ones(len(p)), np.zeros(len(p))]
    return float(roc_auc_score(hard, np.r_[p, p], sample_weight=np.r_[w * y, w * (1 - y)]))


def soft_logloss(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    hard = np.r_[np.ones(len(p)), np.zeros(len(p))]
    return float(log_loss(hard, np.r_[p, p], sample_weight=np.r_[w * y, w * (1 - y)]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_against_scikit_learn(kind: int, soft: bool, weighted: bool) -> None:
    rows = draw(6000, soft=soft, weighted=weighted)
    state = small_state()
    for start in range(0, 6000, 1700):
        state.update("click", kind, *rows.part(slice(start, start + 1700)))
    found = {
        (line["traffic"], line["metric"]): line
        for line in lines(state, "2024-01-01", "m", "none", 0, {"click": 0.25})
        if line["kind"] == ("impression", "consideration")[kind]
    }
    assert len(found) == 4 * 6
    for traffic in ("all", *TRAFFICS):
        chosen = rows.mask if traffic == "all" else rows.mask & (rows.traffic == TRAFFICS.index(traffic))
        p = rows.prediction[chosen].double().sigmoid().numpy()
        y, w = rows.label[chosen].double().numpy(), rows.weight[chosen].double().numpy()
        loss, rate = soft_logloss(p, y, w), (w * y).sum() / w.sum()
        entropy = soft_logloss(np.full(len(p), rate), y, w)
        trained = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
        expected = {
            "logloss": loss,
            "ne": loss / entropy,
            "ne_train": loss / trained,
            "calibration": (w * p).sum() / (w * y).sum(),
            "rmse": np.sqrt((w * (p - y) ** 2).sum() / w.sum()),
        }
        for metric, value in expected.items():
            assert found[traffic, metric]["value"] == pytest.approx(value, rel=1e-6)
        assert found[traffic, "auc"]["value"] == pytest.approx(soft_auc(p, y, w), abs=1e-4)
        assert found[traffic, "auc"]["n"] == int(chosen.sum())


def test_regression() -> None:
    rows = draw(500)
    state = small_state()
    state.update("watch", 0, *rows.part(slice(None)))
    found = {line["metric"]: line["value"] for line in lines(state, "p", "m", "none", 0) if line["traffic"] == "all"}
    m, w = rows.mask.numpy(), rows.weight.double().numpy()
    p, y = rows.prediction.double().numpy(), rows.label.double().numpy()
    assert found == {
        "rmse": pytest.approx(np.sqrt(np.average((p[m] - y[m]) ** 2, weights=w[m]))),
        "calibration": pytest.approx((w * p)[m].sum() / (w * y)[m].sum()),
    }


@pytest.mark.parametrize("soft", [False, True])
def test_replicates_are_the_metrics_of_copied_rows(soft: bool) -> None:
    rows = draw(5000, soft=soft)
    state = small_state()
    state.update("click", 0, *rows.part(slice(None)))
    pool = Pool("binary")
    pool.add("p", state.cell(0, "click"), 0.2)
    replicates = pool.replicates()
    copies = bootstrap_weights(rows.user, 20)
    m = rows.mask.numpy()
    p, y = rows.prediction.double().sigmoid().numpy()[m], rows.label.double().numpy()[m]
    for r in (0, 7, 19):
        w = (rows.weight.double() * copies[:, r]).numpy()[m]
        loss = soft_logloss(p, y, w)
        assert replicates["logloss"][r] == pytest.approx(loss, rel=1e-5)
        rate = (w * y).sum() / w.sum()
        assert replicates["ne"][r] == pytest.approx(loss / soft_logloss(np.full(len(p), rate), y, w), rel=1e-5)
        # The bins are coarser than the point's, and the error far below the standard error (about 0.01 here).
        assert replicates["auc"][r] == pytest.approx(soft_auc(p, y, w), abs=1e-3)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("centre", [-6.0, -3.0, 0.0])
def test_binned_auc_is_close_to_the_exact_one(spread: float, centre: float) -> None:
    g = torch.Generator().manual_seed(1)
    z = spread * torch.randn(100_000, generator=g) + centre
    y = (torch.rand(100_000, generator=g) < z.sigmoid()).float()
    pool = one_pool(z, y, torch.arange(100_000), replicates=1)
    assert pool.points()["auc"] == pytest.approx(roc_auc_score(y, z), abs=1e-4)


def one_pool(z: Tensor, y: Tensor, user: Tensor, replicates: int) -> Pool:
    ones = torch.ones_like(z)
    state = MetricState([("click", "binary")], ["all"], replicates)
    state.update("click", 0, z, y, ones.bool(), ones, ones.long() * 0, user)
    pool = Pool("binary")
    pool.add("p", state.cell(0, "click"), 0.2)
    return pool


@pytest.mark.parametrize(("spread", "noise", "widest"), [(1.0, 0.05, 1.1), (1.0, 0.2, 1.05), (0.3, 0.05, 2.0)])
def test_standard_error_of_an_auc_difference_survives_the_bins(spread: float, noise: float, widest: float) -> None:
    """Two models that nearly agree: the hardest case, since what tells them apart lies inside the bins."""
    n, g = 4000, torch.Generator().manual_seed(1)
    z = spread * torch.randn(n, generator=g) - 2
    y = (torch.rand(n, generator=g) < z.sigmoid()).float()
    user = torch.randint(0, n // 8, (n,), generator=g)
    models = [z + noise * spread * torch.randn(n, generator=g) for _ in range(2)]
    copies = bootstrap_weights(user, 60).numpy()
    exact = np.diff([[roc_auc_score(y, m, sample_weight=w) for w in copies.T] for m in models], axis=0)
    binned = np.diff([one_pool(m, y, user, 60).replicates()["auc"] for m in models], axis=0)
    assert 0.93 < binned.std() / exact.std() < widest


def test_shared_weights_and_hard_labels_take_no_other_path() -> None:
    rows = draw(3000, weighted=False)
    alone, shared, nearly_hard = small_state(), small_state(), small_state()
    arguments = rows.part(slice(None))
    alone.update("click", 0, *arguments)
    shared.update("click", 0, *arguments, weights=bootstrap_weights(rows.user, 20))
    # A label of one row barely off 1 sends all rows through the path of soft labels.
    first = int((rows.mask & (rows.label == 1)).nonzero()[0])
    arguments[1] = rows.label.clone()
    arguments[1][first] = 1 - 1e-6
    nearly_hard.update("click", 0, *arguments)
    for key, value in alone.state_dict().items():
        assert torch.equal(value, shared.state_dict()[key])
        torch.testing.assert_close(value, nearly_hard.state_dict()[key], atol=1e-3, rtol=1e-5)
    with pytest.raises(ValueError, match="weights are"):
        shared.update("click", 0, *arguments, weights=torch.ones(3000, 7))


def test_rows_behind_the_mask_are_not_looked_at() -> None:
    rows, state, expected = draw(400), small_state(), small_state()
    expected.update("click", 1, *[tensor[rows.mask] for tensor in rows.part(slice(None))])
    rows.prediction[~rows.mask] = torch.nan
    rows.label[~rows.mask] = 77.0
    rows.weight[~rows.mask] = torch.inf
    rows.traffic[~rows.mask] = -1
    state.update("click", 1, *rows.part(slice(None)))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(state.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    state.update("click", 1, *[t if t.dtype != torch.bool else t & False for t in rows.part(slice(None))])
    assert state.cell(1, "click").sums[:, 0].sum() == rows.mask.sum()


def test_a_diverged_model_has_no_metrics_and_a_wrong_label_is_refused() -> None:
    rows, state = draw(100), small_state()
    rows.prediction[:] = torch.nan
    state.update("click", 0, *rows.part(slice(None)))
    assert {line["value"] for line in lines(state, "p", "m", "none", 0)} == {None}
    rows = draw(100)
    rows.label += 0.5
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        state.update("click", 0, *rows.part(slice(None)))


def test_all_zero_labels_give_no_ne_and_no_nan() -> None:
    rows, state = draw(100), small_state()
    rows.label[:] = 0
    state.update("click", 0, *rows.part(slice(None)))
    found = {line["metric"]: line["value"] for line in lines(state, "p", "m", "none", 0) if line["traffic"] == "all"}
    assert found["ne"] is None
    assert found["auc"] is None
    assert found["calibration"] is None
    assert found["ne_train"] is None
    assert found["logloss"] > 0


def test_merging_equals_one_pass() -> None:
    rows = draw(3000)
    whole, first, second = small_state(), small_state(), small_state()
    for task in ("click", "watch"):
        whole.update(task, 0, *rows.part(slice(None)))
        first.update(task, 0, *rows.part(slice(0, 1100)))
        second.update(task, 0, *rows.part(slice(1100, 3000)))
    first.merge(second)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(first.state_dict()[key], value, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="cannot merge"):
        first.merge(MetricState(TASKS, TRAFFICS, replicates=21))


def test_state_dict_and_file_round_trip(tmp_path: Path) -> None:
    rows, state = draw(800), small_state()
    state.update("click", 0, *rows.part(slice(0, 500)))
    loaded = small_state()
    loaded.load_state_dict({key: value.clone() for key, value in state.state_dict().items()})
    path = tmp_path / "deep" / "sums.npz"
    state.save(path)
    read = MetricState.load(path)
    assert [file.name for file in path.parent.iterdir()] == ["sums.npz"]
    # A resumed run ends with the very sums of an unbroken one.
    for part in (state, loaded, read):
        part.update("click", 0, *rows.part(slice(500, 800)))
    for key, value in state.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert torch.equal(read.state_dict()[key], value)
    assert (read.tasks, read.traffics) == (state.tasks, state.traffics)
    with pytest.raises(ValueError, match="other tasks"):
        MetricState([("like", "binary")], TRAFFICS, replicates=20).load_state_dict(state.state_dict())


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 cut off"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sums.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read metric sums"):
        MetricState.load(path)


def test_truncated_file(tmp_path: Path) -> None:
    state, path = small_state(), tmp_path / "sums.npz"
    state.update("click", 0, *draw(100).part(slice(None)))
    state.save(path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match="cannot read metric sums"):
        MetricState.load(path)


def test_rates() -> None:
    counter, other = RateCounter(("click", "like")), RateCounter(("click", "like"))
    label, mask = torch.tensor([1.0, 0, 1, torch.nan]), torch.tensor([True, True, True, False])
    counter.update("click", label, mask, torch.tensor([2.0, 1, 1, 5]))
    other.load_state_dict(counter.state_dict())
    other.update("click", torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.ones(4))
    counter.merge(other)
    assert counter.rates()["click"] == pytest.approx(6 / 12)
    assert np.isnan(counter.rates()["like"])


def _reduce(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    rows, state, counter = draw(2000), small_state(), RateCounter(("click",))
    # Rank 1 has no rows of the second task at all.
    for task in ("click", "watch")[: 2 - rank]:
        state.update(task, 0, *rows.part(slice(rank, None, 2)))
    counter.update("click", *[t[rank::2] for t in (rows.label, rows.mask, rows.weight)])
    rate = counter.rates()["click"]
    assert rate == counter.rates()["click"]
    state.reduce_()
    state.save(f"{folder}/{rank}.npz")
    Path(f"{folder}/{rank}.rate").write_text(repr(rate))
    torch.distributed.destroy_process_group()


def test_two_processes_reduce_to_the_whole(tmp_path: Path) -> None:
    processes.start(_reduce, (str(tmp_path),), 2)
    rows, whole = draw(2000), small_state()
    whole.update("click", 0, *rows.part(slice(None)))
    whole.update("watch", 0, *rows.part(slice(0, None, 2)))
    label = rows.label[rows.mask].double().numpy()
    for rank in range(2):
        reduced = MetricState.load(tmp_path / f"{rank}.npz")
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(reduced.state_dict()[key], value, rtol=1e-5, atol=1e-4)
        rate = float((tmp_path / f"{rank}.rate").read_text())
        assert rate == pytest.approx(np.average(label, weights=rows.weight[rows.mask].double().numpy()))


def test_reduce_alone_changes_nothing() -> None:
    state = small_state()
    state.update("click", 0, *draw(100).part(slice(None)))
    before = {key: value.clone() for key, value in state.state_dict().items()}
    state.reduce_()
    for key, value in state.state_dict().items():
        assert torch.equal(before[key], value)
