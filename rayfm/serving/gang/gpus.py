"""What GPUs a member of a gang may have. Apart, since a pipeline's config reads it and needs no service for that."""

from __future__ import annotations


def check_member_gpus(gpus: float) -> None:
    """Raises ValueError where members would have to share a GPU, or have several."""
    if gpus not in (0.0, 1.0):
        raise ValueError(
            f"member_gpus: {gpus:g}; a member has a GPU of its own (1), since NCCL joins no two processes on one, or "
            "none (0)"
        )
