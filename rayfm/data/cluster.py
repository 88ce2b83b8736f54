"""What the Ray cluster that is joined has, or could have."""

from __future__ import annotations


def cluster_resources() -> tuple[float, float]:
    """CPUs and GPUs of the whole cluster; of one with an autoscaler, what it has at its largest."""
    import ray
    from ray._private.state import state

    now = ray.cluster_resources()
    largest = state.get_max_resources_from_cluster_config() or {}
    cpus, gpus = (max(float(now.get(unit, 0.0)), float(largest.get(unit, 0.0))) for unit in ("CPU", "GPU"))
    return cpus, gpus
