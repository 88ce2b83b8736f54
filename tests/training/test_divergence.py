"""A loss that explodes stops the run; what went wrong first is named; the last good checkpoint stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import training_runs as runs
from example_store import every_feature_schema, write_store

from rayfm.data.store import ExampleStore
from rayfm.training.checkpoint import complete
from rayfm.training.config import DivergenceConfig
from rayfm.training.diagnosis import parameters
from rayfm.training.divergence import DivergenceError, LossWatch, table_of
from rayfm.training.loop import TrainingLoop
from rayfm.training.saving import unfit
from rayfm.training.spec import TrainerSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=2400)
    return root


def spoilt(store: Path, root: Path, column: str, value: float) -> Path:
    """A copy of the store in whose second period 16 examples of step 5 have another value in a column."""
    source, target = ExampleStore(store), ExampleStore(root)
    for period in runs.PERIODS:
        manifest = source.manifest(period)
        for lane in range(manifest.lanes):
            table = pq.read_table(source.lane_path(period, "impression", lane))
            if period == runs.PERIODS[1] and lane == 1:
                values = table[column].to_numpy().copy()
                values[5 * 16 : 6 * 16] = value  # step 5: a lane has 16 of a step's rows
                table = table.set_column(table.column_names.index(column), column, pa.array(values))
            path = target.lane_path(period, "impression", lane)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
        target.commit(manifest)
    return root


def training(store: Path, run_dir: Path, **options: object) -> TrainerSpec:
    return runs.spec(store, run_dir, runs.learner("dcnv2"), checkpoint_every=3, **options)


def test_an_exploded_loss_stops_the_run_and_keeps_its_checkpoint(store: Path, tmp_path: Path) -> None:
    """Watch times of 1e30 s, of which the label is the logarithm; newest are 16 steps of 64 rows."""
    root = spoilt(store, tmp_path / "store", "watch", 1e30)
    spec = training(root, tmp_path / "run", divergence={"factor": 2, "window": 5})
    message = (
        r"dcnv2\.none\.1: term supervised/watch is \d.* times its mean over the 5 steps before step 43: .*; lower the "
        rf".* \(step 5 of {runs.PERIODS[1]}; the newest checkpoint is .*/00001-00000003\)"
    )
    with pytest.raises(DivergenceError, match=message):
        runs.train_here(spec)
    assert [path.name for path in complete(spec.folder / "checkpoints")] == ["00001-00000000", "00001-00000003"]
    cured = training(store, tmp_path / "run")
    assert runs.train_here(cured).done[-1][0] == runs.PERIODS[-1], "goes on from there once its cause is gone"


def test_an_input_that_is_not_finite_is_named(store: Path, tmp_path: Path) -> None:
    spec = training(store, tmp_path)
    original = TrainingLoop._training_reader

    def reader(self: TrainingLoop, *arguments):
        made = original(self, *arguments)
        read = made.batches

        def batches(period: str, start: int = 0):
            for step, batch in enumerate(read(period, start), start):
                if step == 4:
                    batch.dense[7, 0] = torch.inf
                    batch.example_id[7] = 4711
                yield batch

        made.batches = batches
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_training_reader", reader)
        with pytest.raises(DivergenceError, match=r"not finite at step 4: dense feature 'age' is inf in example 4711"):
            runs.train_here(spec)


def test_a_table_that_is_not_finite_is_named(store: Path, tmp_path: Path) -> None:
    spec = training(store, tmp_path)
    original = TrainingLoop._report

    def spoil(self: TrainingLoop, period: str, step: int, *arguments) -> None:
        if step == 4:
            for name, value in self.learners[0].dmp.state_dict().items():
                if ".ad.weight" in name:
                    value.local_shards()[0].tensor[:] = torch.nan
        original(self, period, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_report", spoil)
        message = r"not finite at step 4: table 'ad' \(of ad, history\): row 0 and 49 more are not finite; "
        with pytest.raises(DivergenceError, match=message):
            runs.train_here(spec)


def test_a_state_that_is_not_finite_is_never_a_checkpoint(store: Path, tmp_path: Path) -> None:
    """A row that no step reads again would not show in any loss."""
    spec = training(store, tmp_path)
    original = TrainingLoop._finish

    def spoil(self: TrainingLoop, *arguments, **kwargs) -> None:
        original(self, *arguments, **kwargs)
        for name, value in self.learners[0].dmp.state_dict().items():
            if ".user.weight" in name:
                shard = value.local_shards()[0].tensor
                unread = int((shard.std(1) > 0).nonzero()[-1])
                shard[unread, 3] = -torch.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_finish", spoil)
        with pytest.raises(DivergenceError, match=r"table 'user' \(dcnv2.*not finite|not finite at step .*'user'"):
            runs.train_here(spec)
    assert [path.name for path in complete(spec.folder / "checkpoints")][-1] == "00001-00000000"


def test_a_sum_of_squares_may_overflow_and_a_weight_may_not() -> None:
    infinite, nan = torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan, 1.0])
    assert [unfit("fm.model.model.w", value) for value in (infinite, -infinite, nan, nan[1:])] == [True] * 3 + [False]
    assert [unfit("fm.optimizer.state.w.momentum1", value) for value in (infinite, nan, nan[1:])] == [
        False,
        True,
        False,
    ]
    assert not unfit("fm.model.model.w", nan[:0])
    assert not unfit("fm.model.model.rows", torch.tensor([1, 2]))


def watched(values: list[float], weight: float = 1000.0, **config: float) -> list[int]:
    watch = LossWatch(DivergenceConfig.model_validate(config))
    return [step for step, value in enumerate(values) if watch.exploded("t", value * weight, weight)]


def test_an_explosion_is_seen_in_its_step() -> None:
    assert watched([0.5] * 10 + [9.9, 0.5, 10.1], factor=20, window=5) == []
    assert watched([0.5] * 10 + [10.1], factor=20, window=5) == [10]
    assert watched([0.5] * 4 + [99.0], factor=20, window=5) == [], "too few steps to compare with"
    assert watched([1e-9] * 10 + [0.19], factor=20, window=5) == [], "what has vanished may come back"
    assert watched([1e-9] * 10 + [0.21], factor=20, window=5) == [10]


def test_rare_labels_are_no_explosion() -> None:
    """One click among 1 % of rows that come one by one costs 4.6, 82 times the mean."""
    rng = np.random.default_rng(1)
    clicks = rng.random(20_000) < 0.01
    losses = np.where(clicks, -np.log(0.01), -np.log(0.99))
    assert watched(losses.tolist(), weight=1.0, factor=20, window=100) == []


def test_small_batches_explode_as_one() -> None:
    """Of steps of 100 rows the newest ten count."""
    losses = [0.5] * 60 + [1e6]
    assert watched(losses, weight=100.0, factor=20, window=50) == [60]
    losses = [0.5] * 60 + [15.0] * 10
    assert watched(losses, weight=100.0, factor=20, window=50) == [66, 67, 68, 69]


def test_terms_without_rows_and_no_config_are_left_alone() -> None:
    watch = LossWatch(DivergenceConfig(window=1))
    assert watch.exploded("t", 0.0, 0.0) is None
    assert LossWatch(None).exploded("t", 1e9, 1e9) is None


def test_a_huge_value_is_named_where_nothing_is_not_finite() -> None:
    state = {"model.plain.embedding_bags.tag.weight": torch.tensor([[0.0, 1.0], [-3e5, 2.0]])}
    (finding,) = parameters(state, every_feature_schema())
    assert finding.text == "table 'tag' (of tags): row 1 reaches 3e+05"


def test_a_table_is_named_by_its_name() -> None:
    assert table_of("fm.model.x.embedding_bags.ad.weight") == "table 'ad' (fm.model.x.embedding_bags.ad.weight)"
    assert table_of("fm.model.head.bias") == "fm.model.head.bias"
