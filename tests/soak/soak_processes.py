"""The two parts of the soak that run in processes of their own, so that they can be killed: an updater, a label job.

``python soak_processes.py updater ROOT METADATA HEARTBEAT MODEL ...`` updates until it is killed.
``python soak_processes.py labels ADDRESS RUN FOLDER METADATA VERSION PERIOD`` labels a period and ends.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

TEACHER, TEACHER_MODEL, TASKS = "fm", "fm.teacher.0", ("click", "watch")
POLL_S = 0.3
LEASE_S = 10.0


def updater(root: str, metadata: str, heartbeat: str, *models: str) -> None:
    """Move `current` of each model to its newest intact version, and expire old ones, as long as the parent lives."""
    from rayfm.serving.follow import check_buildable
    from rayfm.snapshots import SnapshotStore, StoreUnavailable, open_metadata
    from rayfm.snapshots.collect import Collector
    from rayfm.snapshots.updater import Updater

    collector = Collector(SnapshotStore(root), open_metadata(metadata))
    updaters = [Updater(collector, model, f"updater {os.getpid()}", check_buildable, LEASE_S) for model in models]
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            for one in updaters:
                one.step()
                collector.expire(one.model)
            Path(heartbeat).write_text(str(os.getpid()))
        except StoreUnavailable as error:
            print(error, flush=True)
        time.sleep(POLL_S)


def labels(address: str, run: str, folder: str, metadata: str, version: str, period: str) -> None:
    """Label one period with one snapshot through the teacher's service, holding the snapshot meanwhile."""
    import ray

    from rayfm.data.store import ExampleStore
    from rayfm.labels.store import LabelStore
    from rayfm.serving.application import teacher_handle
    from rayfm.serving.labelling import label_period
    from rayfm.snapshots import SnapshotStore, open_metadata
    from rayfm.snapshots.collect import Collector
    from rayfm.snapshots.keeper import LeaseKeeper

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    root = Path(folder)
    snapshots, store = SnapshotStore(root / "run"), open_metadata(metadata)
    lease = Collector(snapshots, store).hold(TEACHER_MODEL, version, f"label {period}", 60.0)
    keeper = LeaseKeeper(store, 60.0)  # goes on after a metadata store that was away
    keeper.keep(lease)
    ticket = label_period(
        LabelStore(root / "labels"), snapshots, ExampleStore(root / "data"), TEACHER, TEACHER_MODEL, version, period,
        TASKS, teacher_handle(run, TEACHER), rows_per_request=512,
    )  # fmt: skip
    keeper.close()
    print(ticket, flush=True)


if __name__ == "__main__":
    from rayfm.quiet import collect_less

    collect_less()
    {"updater": updater, "labels": labels}[sys.argv[1]](*sys.argv[2:])
