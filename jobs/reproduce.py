r"""Reproduce the papers' tables, as a job.

    ray job submit --working-dir . -- python jobs/reproduce.py TABLE ... --folder FOLDER \
        [--source SOURCE] [--data FOLDER] [--seeds 1,2,3] [--quick]

FOLDER is on a file system that every node mounts. What was trained there before is not trained again.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("reproduce", sys.argv[1:], __doc__))
