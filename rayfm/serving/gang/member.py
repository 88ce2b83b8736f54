"""A member of a gang: an actor with its slices of a teacher, which answers for its share of the rows."""

from __future__ import annotations

import datetime
import os
import socket
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.distributed as dist

from rayfm.data.encode import EncodedChunk
from rayfm.labels.columns import REPRESENTATION
from rayfm.serving.gang.sharded import ShardedVersion
from rayfm.serving.versions import blank_example, check_warm
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.device import visible_device

GROUP_TIMEOUT_S = 120.0
"""Seconds that a member waits for the others in one exchange before it gives up."""


class GangMember:
    """One process of the group. The replica that owns it calls every method on all members, in one order.

    Methods of the group ``loading`` run beside a forward, in a thread of their own, and exchange in process groups of
    their own: one a version, made anew for each load, so that a load that failed half-way leaves no other out of step.

    Args:
        root: folder that holds ``snapshots/``.
        model: the model's key.
        rank: which member.
        world: how many there are.
        threads: intra-op threads.
        row_wise_from: as ``ShardedVersion``'s.
    """

    def __init__(self, root: str, model: str, rank: int, world: int, threads: int, row_wise_from: int) -> None:
        torch.set_num_threads(threads)
        self.store, self.model, self.rank, self.world = SnapshotStore(root), model, rank, world
        self.row_wise_from = row_wise_from
        self.versions: dict[int, ShardedVersion] = {}
        """By the number of their load."""
        self._chunk: EncodedChunk | None = None

    def address(self) -> str:
        """Where this member can be reached by the others: ``tcp://host:port`` with a free port."""
        host = socket.gethostbyname(socket.gethostname())
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def join(self, address: str) -> int:
        """Meet the others at rank 0's address; returns this process's id."""
        os.environ["LOCAL_WORLD_SIZE"] = str(self.world)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=address,
            rank=self.rank,
            world_size=self.world,
            timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S),
        )
        return os.getpid()

    @ray.method(concurrency_group="health")
    def alive(self) -> bool:
        """Answers beside a running forward."""
        return True

    @ray.method(concurrency_group="loading")
    def load(self, number: int, version: str) -> int:
        """Load this member's slices of a version; returns how many numbers of tables it holds.

        Raises:
            SnapshotError: the version cannot be loaded.
        """
        # First, so that members whose load fails have made as many groups as the others.
        group = dist.new_group(timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S))
        device = visible_device(self.rank)
        try:
            loaded = ShardedVersion(self.store, self.model, version, device, group, self.row_wise_from)
        except BaseException:
            dist.destroy_process_group(group)
            raise
        self.versions[number] = loaded
        return loaded.elements

    @ray.method(concurrency_group="loading")
    def warm(self, number: int) -> None:
        """One forward of one example without features, which all members take together.

        Raises:
            SnapshotError: a prediction is not finite.
        """
        loaded = self.versions[number]
        encoder = loaded.encoder
        predictions, _ = loaded.predict(encoder.batch(blank_example(encoder), 0, 1).to(visible_device(self.rank)))
        check_warm(loaded.version, predictions)

    @ray.method(concurrency_group="loading")
    def drop(self, number: int) -> None:
        """Let go of a version that no request uses; nothing where its load failed."""
        loaded = self.versions.pop(number, None)
        if loaded is not None:
            group = loaded.group
            del loaded
            dist.destroy_process_group(group)

    def encode(self, table: pa.Table, number: int) -> None:
        """Take this member's rows for the forwards that follow. No exchange: rows that cannot be encoded hurt nobody.

        Raises:
            DataError: as ``Encoder.encode``.
        """
        rows = table.num_rows
        none = np.zeros((rows, 0), np.float32)
        encoder = self.versions[number].encoder
        self._chunk = encoder.encode(table, np.zeros(rows, np.int64), none, none.astype(np.bool_))

    def score(self, number: int, steps: int, rows_at_once: int, representation: bool) -> pa.Table:
        """Predictions of a version for the rows taken last, in ``steps`` forwards that all members take together.

        Returns:
            A float32 column per task, in the rows' order; with ``representation`` also that.
        """
        loaded, chunk = self.versions[number], self._chunk
        assert chunk is not None
        self._chunk = None
        rows = len(chunk.example_id)
        columns: dict[str, Any] = {task: np.empty(rows, np.float32) for task in loaded.tasks}
        vectors = np.empty((rows if representation else 0, loaded.representation_dim), np.float32)
        for step in range(steps):
            start = min(rows, step * rows_at_once)
            stop = min(rows, start + rows_at_once)
            batch = loaded.encoder.batch(chunk, start, stop).to(visible_device(self.rank))
            predictions, representation_BH = loaded.predict(batch)
            for task in loaded.tasks:
                columns[task][start:stop] = predictions[task].float().cpu().numpy()
            if representation:
                vectors[start:stop] = representation_BH.float().cpu().numpy()
        if representation:
            flat = pa.array(vectors.reshape(-1))
            columns[REPRESENTATION] = pa.FixedSizeListArray.from_arrays(flat, loaded.representation_dim)
        return pa.table(columns)
