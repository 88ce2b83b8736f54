"""A checkpoint of N workers goes on with M, under the same sharding and another, optimiser state included."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import forked
import processes
import pytest
import torch
import torch.distributed as dist
import training_runs as runs
from example_store import write_store

from rayfm.config import RayfmError
from rayfm.training.checkpoint import CheckpointState, Cursor
from rayfm.training.config import TrainingConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.sharding import Carried, check_carried

WORLDS = (1, 2, 4)
BEFORE, AFTER = 3, 3
"""Steps up to the checkpoint, and from there on."""

ROWWISE: dict[str, dict[str, Any]] = {
    "rows": {"sharding": "row_wise"},
    "tables": {"sharding": "table_wise"},
    "columns": {"sharding": "column_wise"},
    "mixed": {
        "sharding_overrides": {"user": "row_wise", "ad": "column_wise", "tag": "table_wise"},
        "table_overrides": {"topic": {"type": "adam", "lr": 0.01}, "tag": {"type": "sgd", "lr": 0.1}},
    },
}
"""Plans that train alike on any number of workers, with row-wise Adagrad where nothing else is said."""
ADAGRAD = {
    f"{name}/adagrad": {"sharding": f"{kind}_wise", "tables": {"type": "adagrad", "lr": 0.02}}
    for name, kind in (("rows", "row"), ("tables", "table"), ("columns", "column"))
}
"""Plans between which a checkpoint may move, since each element has its own sum."""
PLANS = ROWWISE | ADAGRAD


def loop(store: str, folder: str, plan: str, world: int) -> TrainingLoop:
    run_dir = Path(folder) / plan.replace("/", "-") / str(world)
    # Adam would make a whole step of a gradient that is rounding alone, such as that of a bias before a softmax.
    dense = {"type": "adagrad", "lr": 0.01, "initial_accumulator": 0.1}
    spec = runs.spec(Path(store), run_dir, runs.learner("dcnv2"), runs.learner("dmin"), dense=dense, **PLANS[plan])
    return TrainingLoop(spec, runs.Free())


def train(trained: TrainingLoop, first: int, steps: int) -> None:
    batches = trained._training_reader(0, first, {}).batches(runs.PERIODS[0], first)
    for step, batch in enumerate(itertools.islice(batches, steps), first):
        for learner in trained.learners:
            learner.train_step(batch, step)


def whole(trained: TrainingLoop) -> dict[str, torch.Tensor]:
    """All parameters, put together from all ranks' slices."""
    mine = [
        (f"{learner.config.key}/{part.name}", part.shape, part.offsets, part.tensor.detach().clone())
        for learner in trained.learners
        for part in learner.slices()
    ]
    parts: list[Any] = [None] * trained.world
    dist.all_gather_object(parts, mine)
    found: dict[str, torch.Tensor] = {}
    for name, shape, offsets, values in itertools.chain(*parts):
        target = found.setdefault(name, torch.full(tuple(shape), torch.nan))
        place = tuple(slice(start, start + size) for start, size in zip(offsets, values.shape, strict=False))
        target[place] = values
    return found


def save(rank: int, world: int, store: str, folder: str) -> None:
    """Every plan's checkpoint, and where the training that made it got to."""
    with forked.group(rank, world, f"{folder}/save-{world}"):
        for plan in PLANS:
            saved = loop(store, folder, plan, world)
            train(saved, 0, BEFORE)
            saved.checkpoints.save(saved.learners, CheckpointState(cursor=Cursor(), steps_done={}), wait=False)
            train(saved, BEFORE, AFTER)  # while it is written
            saved.checkpoints.finish()
            values = whole(saved)
            if rank == 0:
                torch.save(values, ended(folder, plan, world))


def load(rank: int, world: int, store: str, folder: str) -> None:
    """Go on from what was saved: by the same plan, and where it can be by another, on other numbers of workers."""
    with forked.group(rank, world, f"{folder}/load-{world}"):
        for plan in PLANS:
            loaded = loop(store, folder, plan, world)
            for origin in ADAGRAD if plan in ADAGRAD else [plan]:
                reference = torch.load(ended(folder, origin, 1))
                for number in WORLDS if plan in ROWWISE else (WORLDS[WORLDS.index(world) - 1],):
                    loaded.checkpoints.root = loop_folder(folder, origin, number)
                    assert loaded.checkpoints.load(loaded.learners) is not None
                    train(loaded, BEFORE, AFTER)
                    found = whole(loaded)
                    where = f"{number} workers, {origin} -> {world} workers, {plan}"
                    assert found.keys() == reference.keys(), where
                    for name, value in found.items():
                        assert torch.allclose(value, reference[name], rtol=1e-3, atol=1e-5), f"{where}: {name}"


def ended(folder: str, plan: str, world: int) -> Path:
    return Path(folder) / f"{plan.replace('/', '-')}-{world}.pt"


def loop_folder(folder: str, plan: str, world: int) -> Path:
    return Path(folder) / plan.replace("/", "-") / str(world) / "trainers" / "group" / "checkpoints"


def test_a_checkpoint_of_n_workers_goes_on_with_m(tmp_path: Path) -> None:
    """1, 2 and 4 in every direction, by rows, tables, columns and mixed; and from each of these to each other one."""
    write_store(tmp_path / "store", list(runs.PERIODS[:1]), impressions=500)
    for work in (save, load):
        for world in WORLDS:
            processes.start(work, (world, str(tmp_path / "store"), str(tmp_path)), world)
    rows, columns = (torch.load(ended(str(tmp_path), plan, 1)) for plan in ("rows", "columns"))
    assert any(not torch.allclose(rows[name], columns[name], rtol=1e-3, atol=1e-5) for name in rows), (
        "row-wise Adagrad's sums are by part: that is why the parts must not follow the number of workers"
    )


def carried(kind: str = "row_wise", parts: int = 1, optimizer: str = "rowwise_adagrad") -> dict[str, Carried]:
    return {"model.bags/ad": Carried(kind=kind, parts=parts, optimizer=optimizer)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, carried("column_wise", 2)),
        (carried("row_wise"), carried("table_wise")),
        (carried("table_wise"), carried("column_wise", 1)),
        (carried("column_wise", 2), carried("column_wise", 2)),
        (carried("row_wise", 1, "adagrad"), carried("column_wise", 2, "adagrad")),
        (carried("column_wise", 4, "sgd"), carried("column_wise", 2, "sgd")),
    ],
)
def test_what_can_be_carried_is(old: dict[str, Carried], new: dict[str, Carried]) -> None:
    check_carried(old, new, "here")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (carried(), carried("column_wise", 2), "sharded row_wise and is now column_wise in 2 parts; row-wise Adagrad"),
        (carried("column_wise", 2), carried("table_wise"), "sharded column_wise in 2 parts and is now table_wise"),
        (
            carried("column_wise", 4),
            carried("column_wise", 2),
            "sharded column_wise in 4 parts and is now column_wise in 2",
        ),
        (carried(), carried(optimizer="sgd"), "trained by rowwise_adagrad and is now by sgd, whose state"),
        (carried(), carried("data_parallel", 1, "adam"), "trained by rowwise_adagrad and is now by adam"),
    ],
)
def test_what_cannot_be_carried_is_refused(old: dict[str, Carried], new: dict[str, Carried], message: str) -> None:
    with pytest.raises(RayfmError, match=f"^here: table 'ad' was {message}"):
        check_carried(old, new, "here")


def test_a_run_is_refused_before_it_trains(tmp_path: Path) -> None:
    write_store(tmp_path / "store", list(runs.PERIODS), impressions=100)
    made = runs.spec(tmp_path / "store", tmp_path / "run", runs.learner("fm"), sharding="row_wise")
    runs.train_here(made.model_copy(update={"periods": runs.PERIODS[:1]}))
    (made.folder / "plans" / "fm.none.1.json").unlink()
    training = made.training.model_copy(update={"sharding": "column_wise"})
    with pytest.raises(RayfmError, match=r"fm\.none\.1: table '\w+' was sharded row_wise and is now column_wise in 2"):
        runs.train_here(made.model_copy(update={"training": training}))


@pytest.mark.parametrize(("columns", "parts"), [(16, 4), (8, 2), (12, 3), (4, 1), (10, 1), (64, 4), (24, 3), (40, 2)])
def test_columns_are_cut_by_fours(columns: int, parts: int) -> None:
    assert TrainingConfig().column_parts_of(columns) == parts
