"""Train teachers, or groups of students whose labels stand, as a job.

    ray job submit --working-dir . -- python jobs/train.py CONFIG [KEY=VALUE ...] [--trainer NAME ...]

Training goes on where it stopped.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("train", sys.argv[1:], __doc__))
