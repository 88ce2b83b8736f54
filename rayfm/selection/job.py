"""Scoring all items: on Ray Data's actors, or one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from rayfm.config import CapacityError, DataError
from rayfm.config.nodes import NodeLabels
from rayfm.data.cluster import cluster_resources
from rayfm.data.reader import quiet_ray_data
from rayfm.data.task_errors import raise_error
from rayfm.selection.scoring import Item, ItemScorer, Measured, ScoreItems

Watch = Callable[[int, int], None]
"""Called with how many items are scored, and how many there are."""


def unscored(measured: Measured, items: list[Item]) -> list[Item]:
    """The items that have no file."""
    return [item for item in items if not item.path(measured.folder).exists()]


def score_here(measured: Measured, items: list[Item], watch: Watch | None = None) -> None:
    """Score what has no file yet, in this process.

    Raises:
        RayfmError: as `ItemScorer.score`.
    """
    left = unscored(measured, items)
    scorer = ItemScorer(measured)
    for done, item in enumerate(left, len(items) - len(left) + 1):
        scorer.score(item)
        if watch is not None:
            watch(done, len(items))


def score_on_ray(
    measured: Measured,
    items: list[Item],
    cpus: float = 1.0,
    watch: Watch | None = None,
    nodes: NodeLabels | None = None,
) -> None:
    """Score what has no file yet on as many actors as the cluster has room for, each with the model in memory.

    An actor that dies is replaced and its item scored again; no row passes the driver. Ray must be running.

    Args:
        measured, items: what to score.
        cpus: CPUs of an actor.
        watch: told whenever an item is scored.
        nodes: labels of the nodes that actors run on.

    Raises:
        CapacityError: no actor fits.
        RayfmError: as `ItemScorer.score`.
    """
    import ray
    import ray.data

    left = unscored(measured, items)
    if watch is not None:
        watch(len(items) - len(left), len(items))
    if not left:
        return
    have, _ = cluster_resources()
    fits = int((have + 1e-9) / cpus)
    if fits < 1:
        raise CapacityError(f"a scoring worker needs {cpus:g} CPUs and Ray has {have:g}; lower select.cpus")
    done = len(items) - len(left)
    with quiet_ray_data(nodes=nodes):
        # from_items, not from_arrow: that one runs a task of a whole CPU, which a small machine may not have free.
        dataset: ray.data.Dataset = ray.data.from_items(
            [{"item": position} for position in range(len(left))], override_num_blocks=len(left)
        ).map_batches(
            ScoreItems,
            fn_constructor_args=(measured, left),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            concurrency=(1, min(fits, len(left))),
        )
        blocks: Iterator[pa.Table] = iter(
            dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        )
        for block in blocks:
            raise_error(block)
            done += block.num_rows
            if watch is not None:
                watch(done, len(items))
    missing = unscored(measured, items)
    if missing:
        path = missing[0].path(measured.folder)
        raise DataError(
            f"{path} was scored and is not there; on a cluster 'runs' must be a folder that every node mounts"
        )
