"""What must be true once everything has recovered: each accepted row labelled once, by the version that was named."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pyarrow as pa
from served_models import predictions
from soak_load import Poster
from soak_processes import TASKS, TEACHER
from soak_world import World

from rayfm.labels.lookup import LabelLookup
from rayfm.labels.store import LabelStore
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.spool import Spool
from rayfm.snapshots import SnapshotStore

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def check_near_line(world: World, poster: Poster) -> dict[str, int]:
    """Rows that were posted.

    Returns:
        tickets, rows: accepted; unanswered_rows: labelled although the answer to their post was lost; commits.

    Raises:
        AssertionError: a row is lost, doubled, dead, labelled by another version, or labelled wrongly.
    """
    spool = Spool(world.root, TEACHER)
    assert list(spool.waiting()) == []
    assert [letter.reason for letter in spool.dead_letters()] == []
    labels = NearLineLabels(world.root)
    stored = labels.rows(TEACHER)
    places = list(zip(stored["ticket"].to_pylist(), stored["row"].to_pylist(), strict=True))
    twice = [place for place, count in collections.Counter(places).items() if count > 1]
    assert not twice, f"labelled more than once: {twice[:5]} and {len(twice)} in all"
    accepted = {(ticket, row) for ticket, (_, table) in poster.accepted.items() for row in range(table.num_rows)}
    lost = accepted - set(places)
    assert not lost, f"{len(lost)} accepted rows have no label, the first {min(lost)}"

    # What the tables say of each row, known ticket or not: the named version, and its own predictions.
    unanswered = 0
    by_ticket: dict[str, list[int]] = collections.defaultdict(list)
    for position, (ticket, _) in enumerate(places):
        by_ticket[ticket].append(position)
    versions, ids = stored["version"].to_pylist(), stored["example_id"].to_numpy()
    rows = stored["row"].to_numpy()
    found = {task: stored[f"task_{task}"].to_numpy() for task in TASKS}
    work: dict[str, list[tuple[pa.Table, np.ndarray]]] = collections.defaultdict(list)
    for ticket, positions in by_ticket.items():
        where = np.array(positions)[np.argsort(rows[positions])]
        (version,) = {versions[position] for position in positions}
        if ticket in poster.accepted:
            named, table = poster.accepted[ticket]
            assert version == named, f"{ticket}: {named} was named, {version} labelled"
        else:
            table = poster.sent[int(ids[where[0]])]
            unanswered += table.num_rows
        np.testing.assert_array_equal(ids[where], table["example_id"].to_numpy())
        assert version not in world.corrupt
        work[version].append((table, where))
    for version, parts in work.items():
        expected = predictions(world.models[version], pa.concat_tables([table for table, _ in parts]))
        where = np.concatenate([positions for _, positions in parts])
        for task in TASKS:
            np.testing.assert_allclose(found[task][where], expected[task], err_msg=f"{task} by {version}", **TOLERANCE)
    table = labels.open()
    return {
        "tickets": len(poster.accepted),
        "rows": len(accepted),
        "unanswered_rows": unanswered,
        "versions": len(work),
        "commits": 0 if table is None else table.version(),
    }


def check_periods(world: World) -> dict[str, Any]:
    """Periods that label jobs labelled; those that were killed or failed went on where they were.

    Raises:
        AssertionError: a row has no label, or two, or a wrong one.
    """
    store = LabelStore(world.folder / "labels")
    listed = store.list(TEACHER)
    rows = 0
    jobs = {(version, period) for version, period, _ in world.jobs}
    for version, period in sorted(jobs):
        manifest = world.store.manifest(period)
        lookup = LabelLookup((store.storage, None), TEACHER, version, TASKS)
        for kind in ("impression", "consideration"):
            if not manifest.rows(kind):
                continue
            groups = [g for g in listed if (g.version, g.period, g.kind) == (version, period, kind)]
            assert sum(group.rows for group in groups) == manifest.rows(kind), (version, period, kind)
            assert len({group.lane for group in groups}) == len(groups) == manifest.lanes
            for lane in range(manifest.lanes):
                table = world.store.open_lane(period, kind, lane).read()
                values, mask = lookup.rows(period, kind, lane, 0, len(table), table["example_id"].to_numpy())
                assert mask.all()
                expected = predictions(world.models[version], table)
                for column, task in enumerate(TASKS):
                    np.testing.assert_allclose(values[:, column], expected[task], err_msg=task, **TOLERANCE)
                rows += len(table)
    failed = dict(collections.Counter(world.failures))
    return {"jobs": len(world.jobs), "killed": world.restarts, "failed": failed, "rows": rows}


def check_snapshots(world: World, replies: set[str]) -> dict[str, Any]:
    """No corrupt version ever answered, and old ones were deleted."""
    assert not replies & world.corrupt
    left = SnapshotStore(world.root).versions("fm.teacher.0")
    return {"published": len(world.models), "corrupt": len(world.corrupt), "left_on_disk": len(left)}
