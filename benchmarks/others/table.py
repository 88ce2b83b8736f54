"""What was measured, as rows of 80 columns."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

HEADER = "{:<12}{:<7}{:<5}{:<9}{:<8}{:>8}{:>8}{:>7}{:>8}{:>8}".format(
    *("data", "model", "", "against", "part", "rayfm", "other", "ratio", "AUC", "other")
)
FUXICTR_BAR, PLAIN_BAR = 3.0, 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: examples a CPU-second of both, and their AUC (NaN where the part has none)."""

    data: str
    model: str
    precision: str
    """rayfm's, and the plain loop's; FuxiCTR has fp32 alone."""
    against: str
    part: str
    ours: float
    theirs: float
    ratio: float
    auc: float = float("nan")
    other_auc: float = float("nan")

    def text(self) -> str:
        auc, other = ("" if value != value else f"{value:.4f}" for value in (self.auc, self.other_auc))
        return (
            f"{self.data:<12}{self.model:<7}{self.precision:<5}{self.against:<9}{self.part:<8}"
            f"{self.ours:>8,.0f}{self.theirs:>8,.0f}{self.ratio:>7.2f}{auc:>8}{other:>8}"
        )


Measured = dict[str, Any]
"""``ours/prepare``, ``ours/train/<model>/<precision>/<seed>``, ``fuxictr/prepare``, ``fuxictr/train/<model>/<seed>``,
``plain/<model>/<precision>/<seed>`` -> what was said: ``phases`` (name -> Phase as a mapping) and ``result``."""


def rate(phases: list[dict[str, float]]) -> float:
    """Examples a CPU-second of phases that follow one another on the same examples: CPU-seconds an example add up."""
    return 1.0 / sum(phase["cpu"] / phase["units"] for phase in phases)


def fuxictr_rows(data: str, model: str, precision: str, measured: Measured) -> list[Row]:
    """Preparing, training, and both together; medians over the seeds that both sides have."""
    start, others = f"ours/train/{model}/{precision}/", f"fuxictr/train/{model}/"
    seeds = [key.removeprefix(start) for key in measured if key.startswith(start)]
    seeds = [seed for seed in seeds if others + seed in measured]
    if not seeds:
        return []
    prepared = [measured[f"{side}/prepare"]["phases"]["prepare"] for side in ("ours", "fuxictr")]
    runs = [[measured[place + seed] for seed in seeds] for place in (start, others)]
    trained = [[run["phases"]["train"] for run in side] for side in runs]
    auc = [statistics.mean(run["result"]["auc"] for run in side) for side in runs]

    def row(part: str, ours: float, theirs: float, *scores: float) -> Row:
        return Row(data, model, precision, "FuxiCTR", part, ours, theirs, ours / theirs, *scores)

    alone = [statistics.median(rate([phase]) for phase in side) for side in trained]
    whole = [
        statistics.median(rate([first, phase]) for phase in side) for first, side in zip(prepared, trained, strict=True)
    ]
    return [
        row("prepare", *(rate([phase]) for phase in prepared)),
        row("train", *alone, *auc),
        row("both", *whole),
    ]


def plain_rows(data: str, model: str, precision: str, measured: Measured) -> list[Row]:
    """Training from the example store against a loop on batches in memory."""
    found = [value["result"] for key, value in measured.items() if key.startswith(f"plain/{model}/{precision}/")]
    if not found:
        return []
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    columns = (middle[name] for name in ("rate", "other_rate", "cpu", "auc", "other_auc"))
    return [Row(data, model, precision, "TorchRec", "train", *columns)]
