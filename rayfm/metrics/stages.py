"""Whether stages of a cascade agree: each model against what it is referred to, the next stage's prediction as a rule.

UKDSL section 4.1.2: calibration is this stage's mean prediction over the next stage's; NE takes the next stage's
prediction as label. Considerations have no other label; impressions are scored against their own labels besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

AGAINST_NEXT = {"impression_reference": "impression", "consideration": "consideration"}
"""Kind of scored rows that are scored against a reference -> kind of the rows themselves."""

STAGE_METRICS = ("calibration", "ne", "rmse")


def stage_rows(
    metrics: Iterable[Mapping[str, Any]], references: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """One row per model, variant, task, kind and metric of 4.1.2, from a summary's ``metrics``.

    Args:
        metrics: rows with model, variant, kind, task, metric, value, lo, hi, seeds and n.
        references: model -> task -> the column that it is scored against.

    Returns:
        Rows with model, variant, task, ``against`` (the column), kind (of the rows: impression or consideration),
        metric, value, lo, hi, seeds, n; in the order of the metrics.
    """
    found = []
    for row in metrics:
        column = references.get(row["model"], {}).get(row["task"])
        if column is None or row["kind"] not in AGAINST_NEXT or row["metric"] not in STAGE_METRICS:
            continue
        head = {name: row[name] for name in ("model", "variant", "task")}
        values = {name: row[name] for name in ("metric", "value", "lo", "hi", "seeds", "n")}
        found.append({**head, "against": column, "kind": AGAINST_NEXT[row["kind"]], **values})
    return found
