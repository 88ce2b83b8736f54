"""Retention: which labels go out of the table, in one commit, and which stay because somebody may need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from deltalake import DeltaTable
from pydantic import Field, model_validator

from rayfm.config import Config, LabelError
from rayfm.labels.columns import check_part
from rayfm.labels.delta import Change, apply, table_tasks, taking_turns
from rayfm.labels.index import LabelFile, LabelGroup, groups, label_files
from rayfm.labels.pins import pin_owners
from rayfm.labels.rewrite import Rewritten, rewrite
from rayfm.labels.store import LabelStore

Stored = tuple[str, str, str]
"""(teacher, period, version)"""


class Retention(Config):
    """Which labels to take out: those that meet every condition given. At least one is."""

    teacher: str | None = None
    """Only this teacher's."""
    version: str | None = None
    """Only this version's."""
    period: str | None = None
    """Only this period's."""
    before: str | None = None
    """Only of periods before this one (a period's name or the start of one, such as ``2026-03``)."""
    keep_versions: int | None = Field(None, ge=1)
    """Only versions that this many newer ones supersede in their period. A version supersedes an older one of its
    teacher if it has labelled every lane that the older one has; the newest by name, which opens with the period that
    the version was trained through, is the newest."""

    @model_validator(mode="after")
    def _check(self) -> Retention:
        for name in ("teacher", "version", "period", "before"):
            value = getattr(self, name)
            try:
                if value is not None:
                    check_part(name, value)
            except LabelError as error:
                raise ValueError(str(error)) from None
        if self.version is None and self.period is None and self.before is None and self.keep_versions is None:
            raise ValueError("say what to expire: version, period, before or keep_versions")
        return self


@dataclasses.dataclass(frozen=True)
class Expiry:
    """Labels of one teacher, period and version that a `Retention` names."""

    teacher: str
    period: str
    version: str
    rows: int
    kept_for: tuple[str, ...] = ()
    """Who holds a pin on the version: it stays. Empty: it goes."""


def expire(store: LabelStore, retention: Retention, dry_run: bool = False, also_pinned: bool = False) -> list[Expiry]:
    """Take labels out of the newest table, all in one commit. Files go with the next vacuum.

    A teacher version under a living pin stays: who pinned it may come back to it, with a newer version of the table.
    Whoever has an older version of the table open or pinned reads on. A version taken out can be labelled again.

    Args:
        store: the store, with metadata, where the pins are.
        retention: what to take out.
        dry_run: only say what would happen.
        also_pinned: take out what is pinned too; who pinned it reads on at the table version of the pin.

    Raises:
        LabelError: the store cannot be written; or, unless ``also_pinned``, it has no metadata, where the pins are.
    """
    metadata = None if also_pinned else store.guarded("expiry")
    rewritten: dict[tuple[str, str], Rewritten] = {}

    def attempt() -> list[Expiry]:
        table = store.open()
        if table is None:
            return []
        found = [
            (file, list(groups(store.files, file, table_tasks(table))))
            for file in label_files(table, retention.teacher, retention.period)
        ]
        owners = {} if metadata is None else pin_owners(metadata)
        chosen = _chosen([part for _, parts in found for part in parts], retention)
        expiries = [
            Expiry(*what, rows, tuple(owners.get((what[0], what[2]), ()))) for what, rows in sorted(chosen.items())
        ]
        gone = {(item.teacher, item.period, item.version) for item in expiries if not item.kept_for}
        if gone and not dry_run:
            _take_out(store, table, found, gone, rewritten)
        return expiries

    return taking_turns(store.storage, attempt, "expire labels")


def _chosen(stored: Sequence[LabelGroup], retention: Retention) -> dict[Stored, int]:
    """What the retention names -> its rows."""
    rows: dict[Stored, int] = {}
    lanes: dict[tuple[str, str], dict[str, set[tuple[str, int]]]] = {}
    """(teacher, period) -> version -> what it has labelled."""
    for part in stored:
        what = (part.teacher, part.period, part.version)
        rows[what] = rows.get(what, 0) + part.rows
        lanes.setdefault(what[:2], {}).setdefault(part.version, set()).add((part.kind, part.lane))

    def newer(what: Stored) -> int:
        beside = lanes[what[:2]]
        return sum(version > what[2] and held >= beside[what[2]] for version, held in beside.items())

    return {
        what: count
        for what, count in rows.items()
        if (retention.version is None or what[2] == retention.version)
        and (retention.before is None or what[1] < retention.before)
        and (retention.keep_versions is None or newer(what) >= retention.keep_versions)
    }


def _take_out(
    store: LabelStore,
    table: DeltaTable,
    found: Sequence[tuple[LabelFile, list[LabelGroup]]],
    gone: set[Stored],
    rewritten: dict[tuple[str, str], Rewritten],
) -> None:
    """Commit the files without what goes. One that also holds what stays is written anew for each version in it.

    Args:
        rewritten: (path, version) -> what an attempt before this one has written anew.
    """
    remove: list[LabelFile] = []
    add: list[Rewritten] = []
    for file, parts in found:
        held = {part.version for part in parts}
        stays = {version for version in held if (file.teacher, file.period, version) not in gone}
        if stays == held:
            continue
        remove.append(file)
        for version in sorted(stays):
            key = (file.path, version)
            if key not in rewritten:
                rewritten[key] = rewrite(store.files, [file], version)
            add.append(rewritten[key])
    if len(store.written(add)) < len(add):
        raise LabelError(
            f"{store.storage.table}: vacuum took a file that was just written; give it more hours, and expire again"
        )
    apply(table, Change(add=add, remove=remove, expired=sorted(gone)))
