from __future__ import annotations

from benchmarks.run import LINES
from benchmarks.run import OBJECTIVES as MEASURED
from rayfm.distill import OBJECTIVES


def test_every_objective_is_measured_against_none() -> None:
    assert set(MEASURED) == set(OBJECTIVES) - {"supervised"}
    lines = {line.name: line for line in LINES}
    for kind in MEASURED:
        line = lines[f"objectives/{kind}"]
        assert line.arguments[-1] == kind
        assert (line.bar, line.at_most) == (1.10, True)
