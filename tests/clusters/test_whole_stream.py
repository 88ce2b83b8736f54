"""The whole stream on a cluster that starts as a head alone: data, training and serving on nodes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import HEAD_TYPE, FakeCluster, running_fake_cluster
from run_config import small_pipeline, write_config

from rayfm.data.store import ExampleStore
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.plan import student_specs, teacher_spec
from rayfm.training.ledger import check_ledger, expected_ids, read_ledger

ROLE = "rayfm/pool"
ROLES = ("data", "training", "serving")
IDLE_S = 5.0

WHERE = {
    r"MapBatches|ReadSpan|_write_periods|_stage": "data",
    r"RayTrainWorker": "training",
    r"ServeReplica": "serving",
}
"""What a worker process's title says -> the only type of node on which it may be."""


def node_type(role: str) -> dict[str, Any]:
    """At most two nodes of one CPU."""
    resources = {"CPU": 1, "object_store_memory": 100 * 2**20}
    return {"resources": resources, "labels": {ROLE: role}, "node_config": {}, "min_workers": 0, "max_workers": 2}


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own


def write(folder: Path) -> Path:
    config = small_pipeline(folder)
    config["ray"] = {"max_cpus": 6, "nodes": {role: {ROLE: role} for role in ROLES}}
    for training in (config["teachers"]["teacher"]["training"], config["groups"]["students"]):
        training["ledger"] = True
    return write_config(folder, config)


class Watched:
    """What a cluster does while a run is on it."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.most: dict[str, int] = defaultdict(int)
        """Type -> most nodes of it at once."""
        self.seen: dict[str, set[str]] = defaultdict(set)
        """Type -> titles of processes that worked there."""
        self.started: dict[str, set[int]] = defaultdict(set)
        """Type -> raylets that there were."""

    def look(self) -> None:
        raylets = self.cluster.raylets()
        for pid, kind in raylets.items():
            self.started[kind].add(pid)
        for kind in set(raylets.values()):
            self.most[kind] = max(self.most[kind], list(raylets.values()).count(kind))
        for kind, titles in self.cluster.working().items():
            self.seen[kind] |= titles

    def misplaced(self) -> list[str]:
        return [
            f"{title} on {kind}"
            for kind, titles in self.seen.items()
            for title in titles
            for pattern, role in WHERE.items()
            if re.search(pattern, title) and kind != role
        ]


def assert_trained_once(config: PipelineConfig) -> None:
    store = ExampleStore(config.storage)
    periods = tuple(store.periods())
    for spec in (*(teacher_spec(config, name, periods) for name in config.teachers), *student_specs(config, periods)):
        for period in periods:
            expected = expected_ids(store, period, spec.training.batch_size, spec.consideration_share)
            check = check_ledger(read_ledger(spec.folder / "ledger", period), expected)
            assert check.exact, (spec.name, period, check)


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    "RAYFM_CLUSTERS" not in os.environ, reason="takes three minutes of both cores: `make test-clusters`"
)
def test_nodes_come_for_the_work_a_killed_one_costs_time_alone_and_all_go_when_idle(tmp_path: Path) -> None:
    path = write(tmp_path)
    log = tmp_path / "run.log"
    with running_fake_cluster(environment(), {role: node_type(role) for role in ROLES}, 0, IDLE_S) as cluster:
        watched = Watched(cluster)
        command = [sys.executable, "-m", "rayfm.cli.main", "run", str(path), "--set", f"ray.address={cluster.address}"]
        with log.open("wb") as output:
            run = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT)
        killed: int | None = None
        try:
            while run.poll() is None:
                watched.look()
                if killed is None and any((tmp_path / "runs/small/trainers/students/periods").glob("*.json")):
                    killed = next(pid for pid, kind in cluster.raylets().items() if kind == "training")
                    os.kill(killed, signal.SIGKILL)
                time.sleep(0.3)
        finally:
            run.kill()
        assert run.returncode == 0, log.read_text()[-4000:]
        assert killed is not None, "the run ended before a node was killed"
        assert len(watched.started["training"]) > 1, "another node took the place of the one that was killed"
        deadline = time.monotonic() + 60
        while list(cluster.raylets().values()) != [HEAD_TYPE]:
            assert time.monotonic() < deadline, f"idle nodes stay: {cluster.raylets()}"
            time.sleep(0.5)
    assert all(watched.most[role] >= 1 for role in ROLES)
    assert not watched.misplaced()
    for pattern, role in WHERE.items():
        assert any(re.search(pattern, title) for title in watched.seen[role]), (role, watched.seen)
    assert_trained_once(load_config(path, [f"ray.address={cluster.address}"], None))
