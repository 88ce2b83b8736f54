"""A cluster of several nodes on this machine, which Ray's autoscaler makes larger and smaller."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
from ray_head import free_ports, marked, short_folder, started, with_token

HEAD_TYPE = "ray.head.default"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
NODE_TYPE = "RAY_NODE_TYPE_NAME"
"""In the environment of all processes of a node that the autoscaler made."""

COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
"""An external provider has no defaults for them."""


@dataclass(frozen=True)
class FakeCluster:
    """A running cluster."""

    address: str
    mark: str
    environment: dict[str, str]
    """For who joins it: with its token."""

    def raylets(self) -> dict[int, str]:
        """Process id of each node's raylet -> the node's type."""
        found = {}
        for process in marked(self.mark):
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    found[process.pid] = process.environ().get(NODE_TYPE, HEAD_TYPE)
        return found

    def working(self) -> dict[str, set[str]]:
        """Type of a node -> what its worker processes are doing now, as Ray writes it in their titles."""
        raylets, found = self.raylets(), dict[str, set[str]]()
        for pid, node in raylets.items():
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(pid).children():
                    with contextlib.suppress(psutil.Error, IndexError):
                        title = child.cmdline()[0]
                        if title.startswith("ray::") and not title.startswith("ray::IDLE"):
                            found.setdefault(node, set()).add(title.removeprefix("ray::"))
        return found


@contextlib.contextmanager
def running_fake_cluster(
    environment: dict[str, str], node_types: dict[str, dict[str, Any]], head_cpus: int, idle_s: float
) -> Iterator[FakeCluster]:
    """A head with an autoscaler whose nodes are raylets here.

    Args:
        environment: of all processes.
        node_types: the ``available_node_types`` of a ``ray up`` file, without the head's.
        head_cpus: of the head, which has no label.
        idle_s: seconds after which an idle node is taken away.
    """
    folder = short_folder()
    (port,) = free_ports(1)
    head = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            # By its module: ``fake_multinode`` reads a file that Ray's wheel does not have.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
            "use_node_id_as_ip": True,
        },
        "auth": {},
        "available_node_types": {HEAD_TYPE: head, **node_types},
        "head_node_type": HEAD_TYPE,
        "upscaling_speed": 10,
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in COMMANDS},
    }
    autoscaler = folder / "autoscaler.json"
    autoscaler.write_text(json.dumps(config))
    own = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        # A node that is killed is dead after three seconds, not fifteen; one that is slow to answer has its ten.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    environment = with_token(environment, folder / "token")
    with started(environment | own, folder, head_cpus, port=port, autoscaling_config=autoscaler) as (_, mark):
        yield FakeCluster(f"127.0.0.1:{port}", mark, environment)
