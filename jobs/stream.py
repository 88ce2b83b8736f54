"""The whole pipeline, as a job: prepare, train, label, distil, evaluate, report.

    ray job submit --working-dir . -- python jobs/stream.py CONFIG [KEY=VALUE ...] [--follow] [--overwrite]

With ``--follow`` it goes on with every period that becomes complete, until ``ray job stop``. That kills after 3 s,
or what ``RAY_JOB_STOP_WAIT_TIME_S`` says in the job's runtime environment. A killed run is gone on with too.
Exits 0 when the run finished. A run of the config's name that stands is taken up where it stopped, so a job that died
is simply submitted again. Several nodes need ``storage`` and ``runs`` on a folder that all of them mount.
"""

from __future__ import annotations

import sys

from rayfm.cli.jobs import job

if __name__ == "__main__":
    sys.exit(job("stream", sys.argv[1:], __doc__))
