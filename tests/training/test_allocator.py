"""What is freed is kept for the next step."""

from __future__ import annotations

import json
import subprocess
import sys

BYTES, STEPS, PAGE = 8 << 20, 50, 4096

PROGRAM = f"""
import json, resource
import torch
from rayfm.training.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({STEPS}):
        torch.ones({BYTES} // 4) + torch.ones({BYTES} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(json.dumps(faults()))
"""


def test_pages_are_faulted_in_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    # Three blocks a step, each of which would fault its pages in again.
    assert json.loads(done.stdout) < 3 * STEPS * BYTES / PAGE / 10
