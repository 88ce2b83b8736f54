"""What the C library does with memory that is freed, in a process that computes the same step again and again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""glibc's numbers of ``mallopt`` parameters."""

LARGEST = 32 << 20
"""Bytes of the largest block that is taken from the heap: glibc's limit."""
KEPT = 1 << 30
"""Bytes of free heap that a process keeps at most."""
GROWTH = 64 << 20
"""Bytes that the heap grows by at least."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next step. Returns whether the C library can (glibc).

    By default glibc gives blocks of some megabytes back to the kernel as they are freed, and each step's tensors fault
    in their pages again: an eighth of a DeepFM's training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    pairs = ((_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, GROWTH))
    return all(mallopt(parameter, value) for parameter, value in pairs)
