"""Peak memory over the length of a period: ``python -m benchmarks.memory STORE training|predicting|preparing``.

A process that trains on a period of 20 million rows against one that trains on a million: the fixed case's DLRM in
float32 through the training loop, with checkpoints on the way in both. Or the same for predicting a period with all of
its metrics, or for sorting and writing one as `prepare` does. What is compared is the peak of resident memory, pages of
mapped files included. The ratio of CPU-seconds a row stands beside it.

The data are written below STORE's folder and removed: 6 GB for a while.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

from benchmarks.measure import Outcome, report
from benchmarks.period import Result, Task, run

WORK: dict[str, Literal["train", "predict", "prepare"]] = {
    "training": "train",
    "predicting": "predict",
    "preparing": "prepare",
}
FEW, MANY = 1_000_000, 20_000_000
CHECKPOINT_EVERY = 200
"""Steps: fewer than the smaller period has."""


def outcome(few: Result, many: Result) -> Outcome:
    """Both processes as a line of the table."""
    ratio = many.peak / few.peak
    return Outcome(
        ratio,
        (many.cpu / many.rows) / (few.cpu / few.rows),
        f"{many.peak / 1e6:,.0f} MB",
        f"{few.peak / 1e6:,.0f} MB",
        (ratio, ratio),
    )


def compare(folder: Path, what: str, few: int = FEW, many: int = MANY) -> Outcome:
    """Peak memory of both."""
    from benchmarks.data import write_store

    found = []
    for rows in (few, many):
        with tempfile.TemporaryDirectory(dir=folder) as store:
            write_store(Path(store), {"2025-01-01": rows})
            task = Task(store, "2025-01-01", what=WORK[what], checkpoint_every=CHECKPOINT_EVERY)
            found.append(run(task))
        shown = {name: round(getattr(found[-1], name) / 1e6) for name in ("peak", "anonymous", "after")}
        print(json.dumps({"rows": rows, "MB": shown, "cpu": found[-1].cpu}), file=sys.stderr, flush=True)
    return outcome(*found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("what", choices=WORK)
    parser.add_argument("--rows", type=int, nargs=2, default=(FEW, MANY), metavar=("FEW", "MANY"))
    arguments = parser.parse_args()
    report(compare(arguments.store, arguments.what, *arguments.rows))


if __name__ == "__main__":
    main()
