"""The main job, for a cluster: ``ray job submit --working-dir . -- python jobs/stream.py CONFIG [KEY=VALUE ...]``.

With ``--follow`` it goes on with every period that becomes complete, until ``ray job stop``. That kills after 3 s,
or what ``RAY_JOB_STOP_WAIT_TIME_S`` says in the job's runtime environment. A killed run is gone on with too.
Exits 0 when the run finished. A run of the config's name that stands is taken up where it stopped, so a job that died
is simply submitted again. Several nodes need ``storage`` and ``runs`` on a folder that all of them mount.
"""

from __future__ import annotations

import sys

from rayfm.config import RayfmError
from rayfm.pipeline.config import load_config
from rayfm.pipeline.stream import Watch, run


def main(arguments: list[str]) -> int:
    """Run the pipeline of ``arguments``: the config's path, then overrides."""
    follow = {"follow": True} if "--follow" in arguments else {}
    arguments = [argument for argument in arguments if argument != "--follow"]
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        config = load_config(arguments[0], ["ray.address=auto", *arguments[1:]])
        result = run(config, resume=True, watch=Log(), **follow)
    except RayfmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"finished in {result.seconds:.0f} s: {result.report}")
    return 0


class Log:
    """One line whenever a trainer has finished another period: what a job's log should hold."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def __call__(self, watch: Watch) -> None:
        for trainer, (done, _) in watch.trained.items():
            if int(done) > self._done.get(trainer, 0):
                self._done[trainer] = int(done)
                print(f"{trainer}: {int(done)} of {len(watch.pipeline.periods)} periods", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
