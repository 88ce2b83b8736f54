"""Backward and update of tables on a CPU against fbgemm's own kernels: ``python -m benchmarks.kernels STORE
bags|sequences``.

26 tables of 100,000 x 16 and an id each of 4,096 examples, or 3 tables and 12,800 ids each that are not pooled; ids are
skewed as in click logs.
"""

from __future__ import annotations

import sys

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.measure import Outcome, in_turns, rates, report, timed
from rayfm.training.cpu_kernels import as_without, train_fast_here

ROWS, WIDTH, SKEW = 100_000, 16, 8.0
STEPS = 20
"""Of one timed piece of work."""
TABLES_AND_IDS = {"bags": (26, 4096), "sequences": (3, 12_800)}


def compare(what: str) -> Outcome:
    """Ids a second of a backward, in turns."""
    train_fast_here()
    tables, ids_each = TABLES_AND_IDS[what]
    pooling = PoolingMode.SUM if what == "bags" else PoolingMode.NONE
    generator = torch.Generator().manual_seed(1)
    place = (ROWS, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [place] * tables, optimizer=OptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.01, eps=1e-8, pooling_mode=pooling
    )
    made.init_embedding_weights_uniform(-0.01, 0.01)
    count = tables * ids_each
    ids = (torch.rand(count, generator=generator) ** SKEW * ROWS).long()
    offsets = torch.arange(count + 1)

    def backward() -> float:
        gradient = None
        for _ in range(STEPS):
            out = made(ids, offsets)
            gradient = torch.full_like(out, 1e-4) if gradient is None else gradient
            out.backward(gradient)
        return float(STEPS * count)

    def theirs() -> float:
        with as_without():
            return backward()

    return rates(in_turns(lambda: timed(backward), lambda: timed(theirs), repeats=5), "ids")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(compare(sys.argv[2]))
