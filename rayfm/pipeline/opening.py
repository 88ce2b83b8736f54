"""Making a run's folder, or taking up the one that stands: whose it is, and what ``--overwrite`` deletes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from rayfm.config import ConfigError, read_yaml, write_yaml
from rayfm.labels.config import run_storage
from rayfm.pipeline.state import RunState, make_folder


def open_run(run: RunState, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or take up the one that stands.

    Args:
        run: the run.
        resume: go on with what stands.
        overwrite: delete it first.

    Raises:
        ConfigError: it stands and neither ``resume`` nor ``overwrite`` is asked for, or it is another config's; or
            labels of a run whose folder is elsewhere stand where this one's would lie.
        DataError: it cannot be written.
        LabelError: the label store cannot.
    """
    saved = run.run_dir / "config.yaml"
    if overwrite:
        _clear(run, saved)
    elif saved.exists() and not resume:
        raise ConfigError(
            f"{run.run_dir} holds a run; --resume goes on with it, --overwrite starts anew, --set name=NAME "
            "makes another"
        )
    elif saved.exists():
        _same_config(run, saved)
    elif run.config.label_store is not None and run.labels.storage.stands():
        # They would be taken for this run's: versions of equal names hold other weights.
        raise ConfigError(
            f"{run.labels.root} holds labels of a run whose folder is not {run.run_dir}; --overwrite deletes "
            "them, --set name=NAME makes another run"
        )
    if run.config.label_store is not None:
        run.labels.storage.check_access()
    make_folder(run.run_dir)
    make_folder(run.store.root)
    write_yaml(run.config, saved)
    run.tickets.clear_failure()
    run.tickets.clear_stop()
    if run.follow:
        run.stream.go_on()
        for place in range(len(run.stream.arrivals()), len(run.arrivals)):
            run.stream.append(place, run.arrivals[place])


def _clear(run: RunState, saved: Path) -> None:
    """Remove the run of this name, wherever it kept its labels."""
    before = read_yaml(saved).get("label_store") if saved.exists() else None
    kept = [run_storage(run.run_dir, run.config.name, before), run.labels.storage]
    # Labels first: what is left of a run that is broken off here has its config, and is not taken for a new one.
    for storage in kept:
        if storage.root != str(run.run_dir):
            storage.clear()
    if saved.exists():
        # Versions of the new run may bear the names of this one's: a tombstone of then is not for them.
        for model in run.snapshots.models():
            run.collector.forget(model)
        run.collector.metadata.close()
        run.metadata.close()
        shutil.rmtree(run.run_dir)


OPERATIONS = ("promotion", "alerts", "logging", "tracking")
NOT_OF_THE_NUMBERS = ("ray", "runs", "storage", "tune", "select", "follow", *OPERATIONS)
"""Keys that may change between a run and its resumption: they change no number, or count from then on."""


def _same_config(run: RunState, saved: Path) -> None:
    before, now = yaml.safe_load(saved.read_text()), run.config.dump()
    for config in (before, now):
        for key in NOT_OF_THE_NUMBERS:
            config.pop(key, None)
        # It counts for the periods that are labelled from now on; tickets hold what counts for the others.
        for teacher in (config.get("teachers") or {}).values():
            teacher.pop("near_line", None)
        # Where the labels lie belongs to the run; how they are reached does not.
        config["label_store"] = (config.get("label_store") or {}).get("root")
    key = ".".join(_first_difference(before, now))
    if key:
        raise ConfigError(
            f"{saved}: {key!r} differs from the config given; resume with the run's own config, or --overwrite"
        )


def _first_difference(one: Any, other: Any) -> list[str]:
    """Keys that lead to the first value that differs; empty where none does."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other:
                return [key]
            if one[key] != other[key]:
                return [key, *_first_difference(one[key], other[key])]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for position, (left, right) in enumerate(zip(one, other, strict=True)):
            if left != right:
                return [str(position), *_first_difference(left, right)]
    return []
