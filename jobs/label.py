r"""Let teachers label prepared periods, as a job.

    ray job submit --working-dir . -- python jobs/label.py CONFIG [KEY=VALUE ...] \
        [--teacher NAME ...] [--period PERIOD ...]

Periods that are labelled already are left alone.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("label", sys.argv[1:], __doc__))
