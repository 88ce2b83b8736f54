"""What a process does that is killed: imported by the process alone, so it imports little.

Every durable step of the spool and of the label table ends in an ``fsync``: a process that is killed at its n-th one
dies at the n-th boundary between two steps, on each run at the same.
"""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow as pa

from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.labeller import Labeller, take
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.rows import Versions
from rayfm.serving.nearline.spool import ROW, Spool
from rayfm.snapshots import SnapshotStore


def die_at(step: int, before: bool) -> None:
    """Kill this process at its ``step``-th fsync from now, before or after it; never at 0."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if before and calls[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync


def answer(table: pa.Table, version: str) -> tuple[str, pa.Table]:
    """A teacher: its predictions follow from the ids."""
    ids = table["example_id"].to_numpy()
    return version, pa.table({"click": (ids % 100 / 100).astype(np.float32), "watch": ids.astype(np.float32)})


def label_all(plain: dict[str, object], step: int, before: bool) -> None:
    """A consumer: labels everything that waits, in batches of three tickets."""
    config = NearLineConfig.model_validate(plain)
    spool = Spool(config.root, config.teacher)
    labels = NearLineLabels(config.root)
    labeller = Labeller(config, spool, labels, Versions(SnapshotStore(config.root), config.model), answer)
    table = labels.open()
    if table is not None:
        labels.sync(table)  # the log of those who died before, so that the steps are the same each time
    die_at(step, before)
    tickets = [ticket for ticket, _ in spool.waiting()]
    for start in range(0, len(tickets), 3):
        batch = [take(spool, ticket, config) for ticket in tickets[start : start + 3]]
        outcome = labeller.label([entry for entry in batch if entry is not None])
        assert set(outcome.values()) <= {None}, outcome


def accept_some(plain: dict[str, object], step: int, before: bool, told: str) -> None:
    """An intake: accepts posts, and writes each ticket to the file ``told`` once it has it."""
    config = NearLineConfig.model_validate(plain)
    spool = Spool(config.root, config.teacher)
    good = pa.table({"example_id": [1, 2], ROW: [0, 1]})
    bad = good.append_column("reason", pa.array(["x", "y"]))
    die_at(step, before)
    with open(told, "a") as file:
        for _ in range(3):
            file.write(spool.accept(good, "v1", bad) + "\n")
            file.flush()
