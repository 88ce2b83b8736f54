"""What the report says of a run that follows, and of ids with rows of their own."""

from __future__ import annotations

from typing import Any

from rayfm.report.run import Run
from rayfm.report.sections import Listing, training


def trained(period: str, **more: Any) -> dict[str, Any]:
    base = {"event": "trained", "trainer": "fm", "period": period, "examples": 8, "seconds": 2.0, "parts": {}}
    return {**base, "losses": {}, "versions": {}, **more}


def listing(progress: list[dict[str, Any]], title: str) -> Listing | None:
    run = Run(name="run", config="", summary={}, metrics=[], progress=progress)
    return next((part for part in training(run).parts if isinstance(part, Listing) and part.title == title), None)


def test_how_far_each_trainer_is_behind() -> None:
    lag = {"event": "lag", "period": "d3", "trainer": "fm", "newest": "d3", "trained": "d2", "periods": 1}
    progress = [trained("d1", delay_s=9.0), trained("d2", delay_s=4.25), {**lag, "seconds": 86400.0}]
    found = listing(progress, "Behind the stream")
    assert found is not None
    assert found.rows == [[("fm", "name"), ("d3", "name"), ("d2", "name"), "1", "86,400", "4.2"]]
    assert listing([trained("d1")], "Behind the stream") is None


def test_what_became_of_a_tables_ids() -> None:
    ids = {"admitted": 3, "evicted": 1, "known": 1200, "candidates": 7, "refused": 0, "coverage": 0.875}
    found = listing(
        [trained("d1", ids={"user": {**ids, "known": 1}}), trained("d2", ids={"user": ids})],
        "Ids with rows of their own",
    )
    assert found is not None
    assert found.rows == [[("fm", "name"), ("user", "name"), "1,200", "3", "1", "7", "0", "87.5%"]]
    assert listing([trained("d1", ids={})], "Ids with rows of their own") is None
