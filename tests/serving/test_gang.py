"""A teacher that is a gang of members: the same answers, slices alone in memory, a dead member replaces the gang."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from example_store import every_feature_rows
from served_models import CONFIG, SCHEMA, publish_model

from rayfm.config import SnapshotError
from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.gang.member import GangMember
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import TeacherServiceConfig, load_version, score_table
from rayfm.snapshots import Collector, SnapshotStore, open_metadata, read_current, refusals

MODEL = "fm.teacher.0"
ROW_WISE_FROM = 60
"""Some of the small tables are cut by rows, the others lie whole on one member."""
CALIBRATOR = {"calibrator.click.scale": torch.tensor(0.8), "calibrator.click.shift": torch.tensor(-0.4)}


TABLE = "embeddings.bags.embedding_bags.user.weight"


def publish_misfit(root: Path, version: str) -> None:
    """An intact version with a table that is not that of its config."""
    publish_model(root, MODEL, version, 9, extra={TABLE: torch.zeros(3, 8)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    publish_model(tmp_path, MODEL, "v1", 1)
    publish_model(tmp_path, MODEL, "v2", 2, extra=CALIBRATOR)
    return tmp_path


def expected(root: Path, version: str, rows: pa.Table, representation: bool = False) -> pa.Table:
    return score_table(load_version(SnapshotStore(root), MODEL, version), rows, representation=representation)


def assert_same(found: pa.Table, wanted: pa.Table) -> None:
    assert found.column_names == wanted.column_names
    for name in wanted.column_names:
        one, other = (column.combine_chunks() for column in (found[name], wanted[name]))
        if pa.types.is_fixed_size_list(other.type):
            one, other = one.flatten(), other.flatten()
        np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), rtol=2e-6, atol=2e-6)


def _member(rank: int, world: int, port: int, root: Path, folder: Path) -> None:
    """What a member's process does, without Ray."""
    member = GangMember(str(root), MODEL, rank, world, 1, ROW_WISE_FROM)
    member.join(f"tcp://127.0.0.1:{port}")
    rows = every_feature_rows(101, seed=3)
    share = 51
    part = rows.slice(rank * share, share)
    found: dict[str, Any] = {"elements": member.load(0, "v1")}
    if rank:  # one member's disk fails while all load
        read, member.store.read_slice = member.store.read_slice, None  # type: ignore[assignment]
        with pytest.raises(TypeError):
            member.load(1, "v2")
        member.store.read_slice = read  # type: ignore[method-assign]
    else:
        member.load(1, "v2")
    dist.barrier()
    member.drop(1)
    with pytest.raises(SnapshotError, match=r"user.weight' is \[3, 8\], and \[100, 8\]"):
        member.load(2, "v3")
    # A load beside the forwards of another version: neither waits for the other's exchanges.
    loading = threading.Thread(target=member.load, args=(3, "v2"))
    loading.start()
    for _ in range(5):
        member.encode(part, 0)
        found["v1"] = member.score(0, 3, 20, True)
    loading.join()
    member.warm(3)
    member.encode(part, 3)
    found["v2"] = member.score(3, 3, 20, True)
    member.encode(part.slice(0, 1 if rank else 0), 0)  # a member without a row takes part
    found["one"] = member.score(0, 1, 20, False)
    found["held"] = sorted(member.versions)
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_members_answer_as_one_model_and_hold_their_slices_alone(root: Path, tmp_path: Path) -> None:
    publish_misfit(root, "v3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.start(_member, (2, port, root, tmp_path), 2)
    found = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    rows = every_feature_rows(101, seed=3)
    for version in ("v1", "v2"):
        assert_same(pa.concat_tables([found[0][version], found[1][version]]), expected(root, version, rows, True))
    assert found[0]["one"].num_rows == 0
    assert_same(found[1]["one"], expected(root, "v1", rows.slice(51, 1)))
    whole = sum(table.rows * CONFIG.embedding_dim for table in SCHEMA.tables.values())
    held = [found[rank]["elements"] for rank in range(2)]
    assert sum(held) == whole
    assert all(0.2 * whole < own < 0.8 * whole for own in held)
    assert [found[rank]["held"] for rank in range(2)] == [[0, 3], [0, 3]], "what failed, or was dropped, is gone"


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_gangs_follow_current_and_one_with_a_dead_member_is_replaced(root: Path, ray_session: None) -> None:
    url = f"sqlite://{root}/metadata.sqlite"
    handle = start_teacher(
        "gang",
        "fm",
        TeacherServiceConfig(root=str(root), model=MODEL, metadata=url, poll_s=0.2),
        Replicas(replicas=2, cpus=0.1, members=2, member_cpus=0.1, row_wise_from=ROW_WISE_FROM),
    )
    try:
        rows = every_feature_rows(90, seed=5)
        wanted = {version: expected(root, version, rows) for version in ("v1", "v2")}
        for name, answers in ((None, "v2"), ("v1", "v1")):
            version, found = handle.score.remote(rows, name).result(timeout_s=60)
            assert version == answers
            assert_same(found, wanted[version])
        with pytest.raises(Exception, match="not published"):
            handle.score.remote(rows, "v9").result(timeout_s=60)
        with pytest.raises(Exception, match="lack column"):
            handle.score.remote(rows.drop_columns(["user"]), "v1").result(timeout_s=60)
        _, found = handle.score.remote(rows, "v1").result(timeout_s=60)  # bad requests leave the members in step
        assert_same(found, wanted["v1"])

        _swap_under_load(root, handle, rows, wanted)
        _misfit_is_refused(root, handle, rows, url)

        gangs = all_gangs(handle, 2)
        dead = gangs.pop()
        os.kill(dead[0], signal.SIGKILL)
        reasons: list[str] = []
        answered, failed, deadline = 0, 0, time.monotonic() + 150
        while time.monotonic() < deadline:
            try:
                version, found = handle.score.remote(rows).result(timeout_s=60)
            except Exception as error:
                failed += 1
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                assert version == "v3"
                assert_same(found, wanted["v3"])
                answered += 1
            now = {tuple(handle.member_pids.remote().result(timeout_s=60)) for _ in range(4)} if answered > 3 else set()
            if len(now) == 2 and dead not in now:
                break
            time.sleep(0.2)
        else:
            pytest.fail("the gang was not replaced")
        assert answered > 3
        assert gangs <= now, "the other gang was not touched"
        assert failed <= 3, reasons
        assert all("gang of" in reason or "ActorDied" in reason for reason in reasons), reasons
    finally:
        stop_teacher("gang", "fm")


def _swap_under_load(root: Path, handle: Any, rows: pa.Table, wanted: dict[str, pa.Table]) -> None:
    """A new version while requests run side by side: none fails, and each reply is one version's."""
    stop = threading.Event()
    replies: list[tuple[str, pa.Table]] = []
    errors: list[Exception] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                replies.append(handle.score.remote(rows).result(timeout_s=60))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    publish_model(root, MODEL, "v3", 3)
    wanted["v3"] = expected(root, "v3", rows)
    _until(lambda: errors or (len(replies) > 8 and {version for version, _ in replies[-8:]} == {"v3"}))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert {version for version, _ in replies} == {"v2", "v3"}
    for version, found in replies:
        assert_same(found, wanted[version])


def _misfit_is_refused(root: Path, handle: Any, rows: pa.Table, url: str) -> None:
    """No member can load it, so the gangs stay, and `current` goes back."""
    metadata = open_metadata(url)
    publish_misfit(root, "v4")
    _until(lambda: "v4" in refusals(metadata, MODEL) and read_current(metadata, MODEL).version == "v3")
    assert "members; member 0: SnapshotError" in refusals(metadata, MODEL)["v4"].reason
    for _ in range(4):
        assert handle.score.remote(rows).result(timeout_s=60)[0] == "v3"
    holders = Collector(SnapshotStore(root), metadata).holders(MODEL, "v3")
    assert [lease.owner.split(",")[0] for lease in holders] == ["gang of 2"] * 2
    metadata.close()


def _until(condition: Any, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def all_gangs(handle: Any, count: int) -> set[tuple[int, ...]]:
    """Process ids of the members of each replica."""
    found: set[tuple[int, ...]] = set()
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found.add(tuple(handle.member_pids.remote().result(timeout_s=60)))
    assert len(found) == count
    return found
