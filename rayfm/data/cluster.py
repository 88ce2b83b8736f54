"""What the Ray cluster that is joined has, or could have."""

from __future__ import annotations

import dataclasses


def cluster_resources(largest: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """CPUs and GPUs of the whole cluster.

    Args:
        largest: what an autoscaler could make of it, where that is more.
    """
    import ray

    now = ray.cluster_resources()
    return max(float(now.get("CPU", 0.0)), largest[0]), max(float(now.get("GPU", 0.0)), largest[1])


@dataclasses.dataclass(frozen=True)
class Node:
    """A node's labels, CPUs and GPUs, used or not."""

    labels: dict[str, str]
    cpus: float
    gpus: float = 0.0


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    return [
        Node(
            dict(node.get("Labels", {})),
            float(node["Resources"].get("CPU", 0.0)),
            float(node["Resources"].get("GPU", 0.0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
