"""What the metadata store says of each published version, for people."""

from __future__ import annotations

from rayfm.config import SnapshotError
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.current import TRIES, read_current, refusals
from rayfm.snapshots.failures import load_failures, load_failures_of
from rayfm.snapshots.promotion import GUARD


def states(collector: Collector, model: str) -> dict[str, tuple[str, ...]]:
    """Version -> what is said of it; versions of which nothing is said are left out."""
    metadata = collector.metadata
    said: dict[str, list[str]] = {}

    def say(version: str, words: str) -> None:
        said.setdefault(version, []).append(words)

    current = read_current(metadata, model)
    versions = collector.store.versions(model)
    if current is not None:
        say(current.version, "current, pinned" if current.pinned else "current")
        for version in versions:
            if current.version < version <= current.barred:
                say(version, "rolled back")
        if current.version not in versions:
            say(current.version, "files missing")
    for version, refusal in refusals(metadata, model).items():
        say(version, "refused" if refusal.tries >= TRIES else f"failed for {refusal.tries} of {TRIES} updaters")
    for version, failures in load_failures(metadata, model).items():
        if failures.loaders:
            say(version, f"failed to load {failures.times} times")
    for version in versions:
        words = guard_words(collector, model, version)
        if words is not None:
            say(version, words)
    for version in collector.tombstones(model):
        say(version, "being deleted")
    for version in collector.pins(model):
        say(version, "kept")
    for version in versions:
        holders = len(collector.holders(model, version))
        if holders:
            say(version, f"held by {holders}")
    return {version: tuple(words) for version, words in sorted(said.items())}


def guard_words(collector: Collector, model: str, version: str) -> str | None:
    """What the guard said of a version, in a few words; None where it is not guarded, or promoted by the guard."""
    try:
        promotion = collector.store.promotion(model, version)
        if promotion is None:
            return "waits for the guard" if collector.store.guarded(model, version) else None
    except SnapshotError:
        return "its decision cannot be read"
    if not promotion.promoted:
        return f"not promoted: {promotion.reason}"
    return f"promoted by {promotion.by}" if promotion.by != GUARD else None


def details(collector: Collector, model: str, version: str) -> list[str]:
    """Lines on one version: who made it current and why, who holds it until when, why it was refused."""
    metadata = collector.metadata
    lines = []
    current = read_current(metadata, model)
    if current is not None and current.version == version:
        pinned = ", pinned" if current.pinned else ""
        lines.append(f"current{pinned}, by {current.by}: {current.reason}")
    elif current is not None:
        barred = f" (versions up to {current.barred} are barred)" if current.version < version <= current.barred else ""
        lines.append(f"not current: {current.version} is{barred}")
    if version in (refused := refusals(metadata, model)):
        refusal = refused[version]
        state = "refused" if refusal.tries >= TRIES else f"failed for {refusal.tries} of {TRIES} updaters"
        lines.append(f"{state}, {refusal.times} times in all, last by {refusal.by}: {refusal.reason}")
    failures = load_failures_of(metadata, model, version)
    for who, failure in failures.loaders.items() if failures is not None else ():
        lines.append(f"failed to load {failure.times} times for {who}: {failure.reason}")
    lines += _guard_lines(collector, model, version)
    if version in (kept := collector.pins(model)):
        lines.append(f"kept: {kept[version]}")
    if version in collector.tombstones(model):
        lines.append("being deleted")
    lines += [f"held by {lease.owner} (lease {lease.token})" for lease in collector.holders(model, version)]
    return lines


def _guard_lines(collector: Collector, model: str, version: str) -> list[str]:
    try:
        promotion = collector.store.promotion(model, version)
    except SnapshotError as error:
        return [str(error)]
    if promotion is None:
        return ["waits for the guard"] if collector.store.guarded(model, version) else []
    on = f", scored on {promotion.rows:,} rows of {promotion.period}" if promotion.period else ""
    beside = f" beside {promotion.predecessor}" if promotion.predecessor else ""
    lines = [f"{promotion.decision} by {promotion.by}{on}{beside}: {promotion.reason}"]
    return lines + [f"  {figure}" for figure in promotion.figures]
