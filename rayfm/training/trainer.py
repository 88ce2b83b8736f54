"""Running a training loop: in a Ray Train worker group, or in this process."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rayfm.config import RayfmError
from rayfm.config.nodes import NodeLabels
from rayfm.training.config import TrainingConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.progress import progress_file
from rayfm.training.spec import Coordinator, LabelSource, TrainerSpec
from rayfm.training.worker import work


def fit(spec: TrainerSpec, coordinator: Coordinator, label_source: LabelSource | None = None) -> None:
    """Train in a Ray Train worker group that lives through all periods; it is restarted when a worker dies.

    With ``max_workers`` Ray Train also restarts it with more or fewer workers, as the cluster grows or shrinks. Either
    way it goes on from the newest checkpoint, in the middle of a period too.

    Args:
        spec, coordinator, label_source: travel to the workers.

    Raises:
        RayfmError: the workers failed more often than ``max_failures`` allows, with the last error's first line.
    """
    import ray.train
    from ray import cloudpickle
    from ray.train.torch import TorchConfig, TorchTrainer

    training = spec.training
    gpu = training.gpus_per_worker > 0
    trainer = TorchTrainer(
        work,
        train_loop_config={"parts": cloudpickle.dumps((spec, coordinator, label_source))},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            **_workers(training, training.nodes or spec.nodes.training),
            use_gpu=gpu,
            resources_per_worker={"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker}
            if gpu
            else {"CPU": training.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            # A name of its own each time: what resumes is our checkpoint, which holds the cursor.
            name=f"{spec.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str((spec.folder / "ray_train").absolute()),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RayfmError(f"trainer {spec.name}: {lines[-1] if lines else type(error).__name__}") from error


def _workers(training: TrainingConfig, nodes: NodeLabels) -> dict[str, Any]:
    """How many workers Ray Train is asked for, and where."""
    where: dict[str, Any] = {"label_selector": nodes} if nodes else {}
    if training.max_workers is None:
        return {"num_workers": training.workers, **where}
    elastic = (training.workers, training.max_workers)
    return {"num_workers": elastic, "elastic_resize_monitor_interval_s": training.resize_seconds, **where}


@contextlib.contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of this process alone, unless one stands already."""
    if dist.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
        # TorchRec exchanges ids and rows through collectives with one worker too, and gloo has none for a GPU's memory.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def fit_here(spec: TrainerSpec, coordinator: Coordinator, label_source: LabelSource | None = None) -> None:
    """Train in this process, without Ray: one worker."""
    with single_process_group():
        TrainingLoop(spec, coordinator, label_source, progress_file(spec)).run()
