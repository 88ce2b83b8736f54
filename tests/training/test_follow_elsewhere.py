"""A loop that follows on several workers, through Ray Data, and with vocabularies that grow: as one never stopped."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from example_store import every_feature_schema, write_store
from test_follow_loop import DAYS, Followed
from training_runs import IdLabels, learner, losses, spec, train_here, train_on

from rayfm.data.store import ExampleStore
from rayfm.schema import Schema
from rayfm.training.ids import Vocabularies
from rayfm.training.loop import TrainingLoop
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import fit_here, single_process_group

MIN_COUNT = 20


@pytest.fixture(autouse=True)
def asked_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfm.training.follow.ASK_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(DAYS), impressions=300, considerations=100)
    return root


def schema() -> Schema:
    """Users and ads have vocabularies."""
    plain = every_feature_schema().dump()
    for name in ("user", "ad"):
        plain["tables"][name] |= {"id_policy": "vocabulary", "vocabulary": {"min_count": MIN_COUNT}}
    return Schema.model_validate(plain)


def known(store: Path, run_dir: Path, **training: Any) -> TrainerSpec:
    """A trainer that knows its four days from the start, its tables under vocabularies."""
    trainer = spec(store, run_dir, learner("fm"), **training)
    return trainer.model_copy(update={"periods": DAYS, "schema_": schema()})


def followed(trainer: TrainerSpec, run_dir: Path) -> TrainerSpec:
    """The same, that is told two days and follows."""
    return trainer.model_copy(update={"periods": DAYS[:2], "follow": True, "run_dir": str(run_dir)})


def under_way(trainer: TrainerSpec) -> bool:
    """Whether the newest checkpoint is in the middle of a period."""
    newest = sorted((trainer.folder / "checkpoints").glob("*/state.json"))[-1]
    return json.loads(newest.read_text())["cursor"]["period"] is not None


def records(trainer: TrainerSpec) -> list[dict[str, Any]]:
    whole = [json.loads((trainer.folder / "periods" / f"{day}.json").read_text()) for day in DAYS]
    return [{key: record[key] for key in ("examples", "ids")} for record in whole]


def vocabularies(trainer: TrainerSpec) -> dict[str, list[int]]:
    """Table -> the ids that it has after the last day."""
    with single_process_group():
        found = Vocabularies(schema(), None, ExampleStore(trainer.store), trainer.folder / "ids", 3)
        found.restore(DAYS[-1])
    return {table: counted.ids_V.tolist() for table, counted in found._counted.items()}


def assert_as_unbroken(ours: TrainerSpec, theirs: TrainerSpec) -> None:
    whole = ours.model_copy(update={"periods": DAYS})
    found, expected = losses(whole), losses(theirs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert records(whole) == records(theirs)
    assert vocabularies(whole) == vocabularies(theirs)


def admitted(trainer: TrainerSpec) -> list[int]:
    """Ids admitted in each day, over all tables."""
    return [sum(table["admitted"] for table in record["ids"].values()) for record in records(trainer)]


def test_vocabularies_grow_with_the_stream_as_if_it_had_been_known(store: Path, tmp_path: Path) -> None:
    theirs = known(store, tmp_path / "known")
    train_here(theirs)
    ours = followed(theirs, tmp_path / "followed")
    stopped = []
    for stop in (4, 8, 12, None):
        fit_here(ours, Followed(stop=stop), IdLabels())
        stopped.append(under_way(ours))
    assert True in stopped, "a stop in the middle of a period is among them"
    assert sum(count > 0 for count in admitted(theirs)) > 1, "ids are admitted in later periods too"
    assert_as_unbroken(ours, theirs)


def follow(rank: int, world: int, port: int, trainer: TrainerSpec, coordinator: Followed) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayfm.training.follow.ASK_EVERY_S", 0.0)
        TrainingLoop(trainer, coordinator, IdLabels()).run()
    assert rank == 0 or not coordinator.asked, "rank 0 alone asks"
    dist.destroy_process_group()


def follow_on(trainer: TrainerSpec, coordinator: Followed, world: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.start(follow, (world, port, trainer, coordinator), world)


def test_two_workers_stop_and_go_on_together(store: Path, tmp_path: Path) -> None:
    theirs = known(store, tmp_path / "known")
    train_on(theirs, 2)
    ours = followed(theirs, tmp_path / "followed")
    stopped = []
    for stop in (6, 11, None):
        follow_on(ours, Followed(stop=stop), 2)
        stopped.append(under_way(ours))
    assert True in stopped, "a stop in the middle of a period is among them"
    assert_as_unbroken(ours, theirs)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_reads_a_stream_that_stops_and_goes_on(store: Path, tmp_path: Path) -> None:
    """The first pipeline has two days, each later one the day that came; a cursor begins one in the middle of a day."""
    theirs = known(store, tmp_path / "known")
    train_here(theirs)
    ours = followed(known(store, tmp_path, reader="ray_data"), tmp_path / "followed")
    fit_here(ours, Followed(stop=4), IdLabels())
    assert under_way(ours)
    fit_here(ours, Followed(), IdLabels())
    assert_as_unbroken(ours, theirs)
