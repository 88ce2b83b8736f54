"""A teacher that is a gang of members: the same answers, slices alone in memory, a dead member replaces the gang."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from example_store import every_feature_rows, every_feature_schema

from rayfm.models import MODELS, build_model
from rayfm.serving.application import start_teacher, stop_teacher
from rayfm.serving.gang.member import GangMember
from rayfm.serving.teacher import TeacherServiceConfig, load_version, score_table
from rayfm.snapshots import SnapshotStore
from rayfm.snapshots.publish import publish

MODEL = "fm.teacher.0"
SCHEMA = every_feature_schema()
TASKS = ("click", "watch")
CONFIG = MODELS["dcnv2"].Config(embedding_dim=8, hidden=(8,))
ROW_WISE_FROM = 60
"""Some of the small tables are cut by rows, the others lie whole on one member."""


def publish_version(root: Path, version: str, seed: int) -> None:
    model = build_model(CONFIG, SCHEMA, TASKS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    tensors = dict(model.state_dict())
    if seed:  # the second version has a calibrator
        tensors |= {"calibrator.click.scale": torch.tensor(0.8), "calibrator.click.shift": torch.tensor(-0.4)}
    publish(
        root,
        MODEL,
        version,
        tensors,
        trained_through="2024-01-01",
        config=CONFIG.dump(),
        example_schema=SCHEMA.dump(),
        tasks=TASKS,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, version in enumerate(("v1", "v2")):
        publish_version(folder, version, seed)
    return folder


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
    member = GangMember(str(root), MODEL, rank, world, 1, ROW_WISE_FROM, 2)
    member.join(f"tcp://127.0.0.1:{port}")
    rows = every_feature_rows(101, seed=3)
    share = 51
    part = rows.slice(rank * share, share)
    found: dict[str, Any] = {"elements": member.load("v1")}
    member.load("v2")
    for version in ("v1", "v2"):
        member.encode(part, version)
        found[version] = member.score(version, 3, 20, True)
    member.encode(part.slice(0, 1 if rank else 0), "v1")  # a member without a row takes part
    found["one"] = member.score("v1", 1, 20, False)
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_members_answer_as_one_model_and_hold_their_slices_alone(root: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_member, (2, port, root, tmp_path), nprocs=2)
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


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_dead_member_fails_its_gang_which_is_replaced_while_another_serves(root: Path, ray_session: None) -> None:
    handle = start_teacher(
        "gang",
        "fm",
        TeacherServiceConfig(root=str(root), model=MODEL),
        replicas=2,
        cpus=0.1,
        members=2,
        member_cpus=0.1,
        row_wise_from=ROW_WISE_FROM,
    )
    try:
        rows = every_feature_rows(90, seed=5)
        wanted = {version: expected(root, version, rows) for version in ("v1", "v2")}
        version, found = handle.score.remote(rows, "v1").result(timeout_s=60)
        assert version == "v1"
        assert_same(found, wanted["v1"])
        version, found = handle.score.remote(rows, "v2").result(timeout_s=60)
        assert version == "v2"
        assert_same(found, wanted["v2"])
        with pytest.raises(Exception, match="not published"):
            handle.score.remote(rows, "v9").result(timeout_s=60)
        with pytest.raises(Exception, match="lack column"):
            handle.score.remote(rows.drop_columns(["user"]), "v1").result(timeout_s=60)
        _, found = handle.score.remote(rows, "v1").result(timeout_s=60)  # bad requests leave the members in step
        assert_same(found, wanted["v1"])

        gangs = all_gangs(handle, 2)
        dead = gangs.pop()
        os.kill(dead[0], signal.SIGKILL)
        reasons: list[str] = []
        answered, failed, deadline = 0, 0, time.monotonic() + 150
        while time.monotonic() < deadline:
            try:
                version, found = handle.score.remote(rows, "v1").result(timeout_s=60)
            except Exception as error:
                failed += 1
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                assert version == "v1"
                assert_same(found, wanted["v1"])
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


def all_gangs(handle: Any, count: int) -> set[tuple[int, ...]]:
    """Process ids of the members of each replica."""
    found: set[tuple[int, ...]] = set()
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found.add(tuple(handle.member_pids.remote().result(timeout_s=60)))
    assert len(found) == count
    return found
