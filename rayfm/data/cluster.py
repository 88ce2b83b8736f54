"""What the Ray cluster that is joined has, or could have."""

from __future__ import annotations


def cluster_resources(largest: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """CPUs and GPUs of the whole cluster.

    Args:
        largest: what an autoscaler could make of it, where that is more.
    """
    import ray

    now = ray.cluster_resources()
    return max(float(now.get("CPU", 0.0)), largest[0]), max(float(now.get("GPU", 0.0)), largest[1])
