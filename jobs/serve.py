"""Serve a run's teachers and students, as a job, until ``ray job stop``.

    ray job submit --working-dir . -- python jobs/serve.py CONFIG [KEY=VALUE ...] [--production]

Give it time to stop: ``RAY_JOB_STOP_WAIT_TIME_S`` in the job's environment; without it Ray kills after 3 s.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("serve", sys.argv[1:], __doc__))
