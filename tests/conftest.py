"""Shared by all tests: one Ray for the session, real servers, the KuaiRand folder, quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import pytest
import servers

from rayfm.quiet import collect_less

TESTS = Path(__file__).resolve().parent
os.environ.pop("RAY_ADDRESS", None)  # tests start a Ray of their own; somebody else's is not for them
# Between one Ray and the next, a thread that still holds something of the first would start a third by itself.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray makes its workers nicer than all else: beside tests that compute in their own process they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# Sums of several threads differ in their last bits, and some tests compare bits; Ray gives its workers one too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
collect_less()
warnings.filterwarnings("ignore")
for name in ("torchrec", "torch.fx._symbolic_trace", "c10d-NullHandler-dcp_logger", "c10d-NullHandler"):
    logging.getLogger(name).setLevel(logging.ERROR)


RAY: dict[str, Any] = {
    "address": "local",
    "num_cpus": 4,
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
}

WORKERS = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How often Ray Train looks whether its workers are done, or dead: every 2 s otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "rayfm.quiet.collect_less",
    **buckets.KEYS,  # of a bucket, as from the environment of their node
}
"""Environment of Ray's processes alone."""


LONG = (
    "soak/test_soak.py",
    "pipeline/test_job_submit.py",
    "pipeline/test_run.py",
    "training/test_elastic_fit.py",
    "reproduce/test_quick.py",
    "examples/test_example_runs.py",
    "pipeline/test_s3_run.py",
    "serving/test_gang.py",
    "training/test_resharding.py",
    "cli/test_submit.py",
    "serving/test_teacher_autoscaling.py",
    "pipeline/test_follow_run.py",
    "training/test_train_pipeline.py",
    "export/test_compiled_packages.py",
    "training/test_exactly_once.py",
    "training/test_trainer_errors.py",
    "serving/test_nearline_service.py",
    "serving/test_endpoints_ray.py",
    "cluster/test_service_deployed.py",
    "release/test_distribution.py",
)
"""Files of half a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that the processes that share the files end together; the others stay as they are."""
    place = {TESTS / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def start_ray() -> None:
    """A Ray for tests, with what its workers find in their environment."""
    import ray

    # Workers import what tests hand them (look-ups, loops) by module name.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(TESTS) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), *paths]))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in WORKERS.items():
            environment.setenv(name, value)
        ray.init(**RAY)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray of the test session; 4 logical CPUs so that small groups fit side by side on any machine."""
    import ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def fresh_ray(ray_session: None) -> Iterator[None]:
    """A Ray without Ray Serve, for a test that starts Serve on ports of its own; the tests after it have another.

    Serve's ports cannot be changed while it runs, and worker processes hold on to the Serve that they met first: after
    another one is started, a task in such a process waits for the dead one for ever.
    """
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    def anew() -> None:
        serve.shutdown()
        ray.shutdown()
        start_ray()

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        pass  # none was started in this one
    else:
        anew()
    yield
    anew()


@pytest.fixture(scope="session")
def zookeeper_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A real ZooKeeper for the session. A test that kills it starts it again, and uses a chroot of its own."""
    with servers.running(servers.zookeeper(tmp_path_factory.mktemp("zookeeper"))) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A real Redis with an append-only file for the session. A test that kills it starts it again."""
    with servers.running(servers.redis(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="session")
def kuairand() -> Path:
    """The folder of KuaiRand-Pure (RAYFM_KUAIRAND, by default beside the checkout)."""
    default = TESTS.parents[1] / "shared" / "data" / "kuairand"
    folder = Path(os.environ.get("RAYFM_KUAIRAND", default))
    if not folder.exists():
        pytest.skip(f"no KuaiRand data at {folder}; set RAYFM_KUAIRAND")
    return folder
