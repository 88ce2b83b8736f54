from __future__ import annotations

import copy
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayfm.config import DataError
from rayfm.report import summary_table
from rayfm.report.headline import headline_rows, rests_on
from rayfm.report.table import short


@pytest.fixture(scope="module")
def summary(finished_run: Path) -> dict[str, Any]:
    return json.loads((finished_run / "summary.json").read_text())


def rendered(summary: dict[str, Any], task: str | None = None, ansi: bool = False) -> list[str]:
    console = Console(width=80, file=io.StringIO(), force_terminal=ansi, color_system="standard" if ansi else None)
    console.print(summary_table(summary, task))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("task", ["click", "watch_time"])
def test_fits_80_columns_with_a_row_per_model_and_variant(summary: dict[str, Any], task: str) -> None:
    text = rendered(summary, task)
    assert max(map(len, text)) <= 80
    assert not any("…" in line for line in text)
    for variant in ("none", "direct", "auxiliary", "aux+adapter"):
        assert sum(f" {variant} " in line for line in text) == 3
    assert text[4].split()[:2] == ["big_dcnv2", "teacher"]


def test_cells_are_the_summarys(summary: dict[str, Any]) -> None:
    metrics = {
        (r["kind"], r["metric"]): r
        for r in summary["metrics"]
        if (r["model"], r["variant"], r["task"]) == ("fm", "direct", "click")
    }
    ratio = next(
        r for r in summary["transfer_ratio"] if (r["model"], r["variant"], r["kind"]) == ("fm", "direct", "impression")
    )
    text = rendered(summary)
    line = next(line for above, line in pairwise(text) if above.startswith("fm ") and " direct " in line)
    ne = metrics["impression", "ne"]
    assert f"{short(ne['value'], 4)}±{short((ne['hi'] - ne['lo']) / 2, 4)}" in line
    for metric, digits in (("auc", 4), ("logloss", 4), ("calibration", 3)):
        assert f" {short(metrics['impression', metric]['value'], digits)} " in line
    assert f" {short(metrics['consideration', 'calibration']['value'], 3)} " in line
    assert f"{short(ratio['value'], 2)} [{short(ratio['lo'], 2)},{short(ratio['hi'], 2)}]" in line


def test_the_best_is_bold_and_certain_differences_are_marked(summary: dict[str, Any]) -> None:
    rows = headline_rows(summary, "click")
    for model in ("two_tower", "fm", "dlrm"):
        mine = [row for row in rows if row.model == model]
        assert [row.best for row in mine] == [row.ne.value == min(r.ne.value for r in mine) for row in mine]
    certain = {
        (r["model"], r["variant"])
        for r in summary["differences"]
        if (r["kind"], r["task"], r["metric"]) == ("impression", "click", "ne") and r["hi"] < 0
    }
    assert certain
    assert {(row.model, row.variant) for row in rows if row.verdict == "better"} == certain
    bold = [line for line in rendered(summary, "click", ansi=True) if "\x1b[1m" in line and "±" in line]
    assert len(bold) == 3
    worse = copy.deepcopy(summary)
    for row in worse["differences"]:
        row["lo"], row["hi"] = 0.01, 0.02
    assert {row.verdict for row in headline_rows(worse)} == {"", "worse"}


def test_blank_where_there_is_nothing(summary: dict[str, Any]) -> None:
    bare = copy.deepcopy(summary)
    bare["metrics"] = [row for row in bare["metrics"] if row["kind"] == "impression"]
    for row in bare["metrics"]:
        row["lo"] = row["hi"] = None
    for row in bare["transfer_ratio"]:
        row |= {"value": None, "lo": None, "hi": None, "reason": "no teacher"}
    text = "\n".join(rendered(bare))
    assert "None" not in text
    assert "[" not in text
    assert all(row.consideration is None and row.transfer_reason in (None, "no teacher") for row in headline_rows(bare))


def test_says_what_the_intervals_are_over(summary: dict[str, Any]) -> None:
    assert "over users and 3 seeds" in rests_on(summary, headline_rows(summary))
    alone = copy.deepcopy(summary)
    for row in alone["metrics"]:
        row["seeds"] = 1
    assert "one seed" in rests_on(alone, headline_rows(alone))
    assert "No intervals" in rests_on({**alone, "replicates": 0}, headline_rows(alone))


def test_long_names_fold_and_numbers_stay(summary: dict[str, Any]) -> None:
    long = json.loads(json.dumps(summary).replace('"two_tower"', '"two_tower_for_retrieval_of_ads"'))
    text = rendered(long)
    assert max(map(len, text)) <= 80
    numbers = [word for line in rendered(summary) for word in line.split() if "±" in word and len(word) > 1]
    assert all(any(number in line for line in text) for number in numbers)


def test_unknown_task_and_empty_summary(summary: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="did you mean 'click'"):
        summary_table(summary, "clik")
    with pytest.raises(DataError, match="nothing was evaluated"):
        summary_table({})


@pytest.mark.parametrize(
    ("value", "text"), [(0.9021, ".902"), (-0.04, "-.040"), (1.5, "1.500"), (10.05, "10.050"), (None, "")]
)
def test_short(value: float | None, text: str) -> None:
    assert short(value, 3) == text
