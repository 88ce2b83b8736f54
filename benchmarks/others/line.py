"""A line of `benchmarks.run`: ``python -m benchmarks.others.line STORE fuxictr|torchrec MODEL PRECISION``.

Data and what was measured lie below STORE, so that lines share them. FuxiCTR's Python is ``$FUXICTR_PYTHON``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.measure import Outcome, report
from benchmarks.others.__main__ import Bench, missing_fuxictr
from benchmarks.others.cases import open_case
from benchmarks.others.table import Row, fuxictr_rows, plain_rows

DATA = {"fuxictr": "criteo-1m", "torchrec": "criteo-100k"}


def outcome(row: Row) -> Outcome:
    """The row's ratio of examples a CPU-second, of preparing and training together where both are measured."""
    ours, theirs = (f"{rate:,.0f} ex/CPU-s" for rate in (row.ours, row.theirs))
    return Outcome(row.ratio, row.ratio, ours, theirs, (row.ratio, row.ratio))


def main(store: str, against: str, model: str, precision: str) -> None:
    """Measure what is not there yet, and report the last row."""
    python = os.environ.get("FUXICTR_PYTHON")
    if against == "fuxictr" and (why := missing_fuxictr(python)):
        raise SystemExit(f"not measured: set FUXICTR_PYTHON (docs/speed.md). {why}")
    work = Path(store) / "others"
    bench = Bench(open_case(DATA[against], work), work, python)
    for side in ("ours", "fuxictr") if against == "fuxictr" else ("plain",):
        bench.measure(side, [model], [1], (precision,))
    rows = (fuxictr_rows if against == "fuxictr" else plain_rows)(bench.case.name, model, precision, bench.measured)
    report(outcome(rows[-1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
