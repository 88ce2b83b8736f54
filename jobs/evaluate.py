r"""Score a published version on prepared periods, as a job.

    ray job submit --working-dir . -- python jobs/evaluate.py CONFIG --model KEY --period PERIOD ... \
        [--version VERSION] [KEY=VALUE ...]

It scores in the job's own process.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("evaluate", sys.argv[1:], __doc__))
