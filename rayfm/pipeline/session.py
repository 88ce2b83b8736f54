"""Starting Ray quietly, or joining a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from rayfm.config import CapacityError, ConfigError
from rayfm.data.cluster import cluster_resources
from rayfm.operations.logs import environment
from rayfm.pipeline.config import RayConfig
from rayfm.quiet import QUIET_ENVIRONMENT, WORKER_ENVIRONMENT, WORKER_SETUP, quiet_libraries

_SETUP_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Where Ray's workers look for what to call first; `ray._private.ray_constants` of the pinned version."""


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Ray for the time of a run: the one that runs in this process already, a cluster's, or one of our own.

    Raises:
        ConfigError: nodes of a cluster are named, and none is joined.
        CapacityError: no cluster answers at the address.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    import ray

    if ray.is_initialized():
        yield
        return
    address = joined_address(config)
    if not address and any((config.nodes.data, config.nodes.training, config.nodes.serving)):
        raise ConfigError(
            "ray.nodes: the Ray that is started here has no node labels; give ray.address, or leave it out"
        )
    variables = {**QUIET_ENVIRONMENT, **WORKER_ENVIRONMENT, **environment()}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            runtime_env = {"env_vars": variables, "worker_process_setup_hook": WORKER_SETUP}
            ray.init(address=address, runtime_env=runtime_env, **common)
        else:
            # Its processes take after this one. With a runtime environment each would import Ray twice, as it starts
            # twice, and those that Ray starts ahead would fit none: 6 of the 90 CPU-seconds of a small run.
            # The watcher looks for nodes that are about to be taken away; ours is this machine alone.
            inherited = {**variables, _SETUP_VARIABLE: WORKER_SETUP, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
            with _environment(inherited):
                # "local": without it Ray joins whatever `ray start` last left on this machine, alive or long gone.
                ray.init(
                    address="local",
                    num_cpus=int(config.cpus) if config.cpus else None,
                    object_store_memory=config.object_store_mb * 2**20,
                    include_dashboard=False,
                    **common,
                )
    except ConnectionError as error:
        raise CapacityError(f"no Ray cluster at {address}: {error}; start one or leave ray.address out") from None
    try:
        yield
    finally:
        ray.shutdown()  # ends our own Ray with all that runs in it; from a cluster it only disconnects


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """This process's environment with those ``variables`` that it has not; as before afterwards."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def joined_address(config: RayConfig) -> str | None:
    """Where the cluster is that a run joins; None for a Ray of its own, which Ray calls ``local``."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def own_cpus(config: RayConfig) -> int | None:
    """CPUs of a Ray of our own, which stays as large as it is; None on a cluster, which may grow."""
    if joined_address(config):
        return None
    return max(1, int(cluster_resources()[0]))
