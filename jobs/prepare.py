"""Bring raw logs into the example store, as a job.

    ray job submit --working-dir . -- python jobs/prepare.py CONFIG [KEY=VALUE ...]

Periods that stand already are kept.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("prepare", sys.argv[1:], __doc__))
