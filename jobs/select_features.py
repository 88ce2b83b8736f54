"""Choose features by what they are worth, on the warm-up periods, as a job.

    ray job submit --working-dir . -- python jobs/select_features.py CONFIG [KEY=VALUE ...] [--overwrite]

A selection of the config's name that stands is gone on with.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("select_features", sys.argv[1:], __doc__))
