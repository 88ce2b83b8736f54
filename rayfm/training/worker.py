"""What each worker of a trainer's group runs.

Imports nothing heavy before it runs: Ray Train's controller, a process of its own that trains nothing, imports it too.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from rayfm.config import RayfmError


def work(arguments: dict[str, Any]) -> None:
    """Train until all periods are done.

    Args:
        arguments: ``parts``: spec, coordinator and label source, pickled together, so that only who uses them loads
            what they are made of.
    """
    import torch.distributed as dist

    from rayfm.operations.logs import about, configure
    from rayfm.training.loop import TrainingLoop
    from rayfm.training.progress import progress_file

    spec, coordinator, label_source = pickle.loads(arguments["parts"])
    if coordinator.stopped():
        return  # the run failed for a reason that a restart of the workers does not mend
    configure()
    try:
        with about(run=Path(spec.run_dir).name, role=spec.role, trainer=spec.name):
            TrainingLoop(spec, coordinator, label_source, progress_file(spec)).run()
    except RayfmError as error:
        coordinator.failed(str(error))
        if dist.get_world_size() > 1:
            raise  # takes the other ranks out of the collective that they wait in
