"""What `rayfm plan` says of a step against the step: ``python -m benchmarks.plan STORE dlrm|dcnv2|deepfm``.

The device is this processor's one core, whose figures are measured first by pieces that have nothing of the models:
look-ups of random rows, the matrix products of one layer, one small operator. The step is the bare one of
`benchmarks.training`, in float32 on batches in memory, by the kernels that a trainer takes. The ratio is the larger of
both times over the smaller: 1 is exact.

``python -m benchmarks.plan --write cpu.yaml`` writes the figures for ``rayfm plan --hardware cpu.yaml --gpu cpu``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import psutil
import torch
import yaml
from torch.nn import functional

from benchmarks.data import BATCH, model_config, schema
from benchmarks.measure import Outcome, report, timed
from benchmarks.training import HELD, bare_step, batches_in_memory
from rayfm.data.store import ExampleStore
from rayfm.planning.estimate import estimate
from rayfm.planning.hardware import Hardware
from rayfm.planning.search import Cluster
from rayfm.planning.work import Learner
from rayfm.training.config import TrainingConfig
from rayfm.training.cpu_kernels import denormals_as_zero, train_fast_here
from rayfm.training.trainer import single_process_group

REPEATS = 5
STEPS = 20


def seconds(work: Callable[[], object], times: int) -> float:
    """CPU-seconds of one call: the least of a few rounds of ``times`` calls, after one that is not counted.

    CPU-seconds, and the least of them, since a shared machine's other work shows in wall time and in cold caches.
    """
    work()
    rounds = []
    for _ in range(REPEATS):
        start = time.process_time()  # psutil's CPU-seconds, of other benchmarks, come in steps of 10 ms
        for _ in range(times):
            work()
        rounds.append((time.process_time() - start) / times)
    return min(rounds)


def product_flops(dtype: torch.dtype, rows: int = BATCH, inputs: int = 512, outputs: int = 256) -> float:
    """Operations a second of the three products of a layer's step: its forward, and gradients of input and weight."""
    x_BI, w_IO = torch.randn(rows, inputs, dtype=dtype), torch.randn(inputs, outputs, dtype=dtype)
    gradient_BO = torch.randn(rows, outputs, dtype=dtype)

    def layer() -> None:
        x_BI @ w_IO
        gradient_BO @ w_IO.T
        x_BI.T @ gradient_BO

    return 6 * rows * inputs * outputs / seconds(layer, 3)


def lookup_bandwidth(rows: int = 2_600_000, columns: int = 16, ids: int = 26 * BATCH) -> float:
    """Bytes a second of looking up random rows, one a vector, counted as `rayfm.planning.step.piece_load` counts."""
    table = torch.zeros(rows, columns)
    wanted, offsets = torch.randint(0, rows, (ids,)), torch.arange(ids)
    moved = ids * (8 + columns * 4) + ids * columns * 4
    return moved / seconds(lambda: functional.embedding_bag(wanted, table, offsets, mode="sum"), 3)


def operator_seconds() -> float:
    """Starting an operator: an addition to one element."""
    x = torch.zeros(1)
    return seconds(lambda: x + x, 10_000)


def calibrate() -> Hardware:
    """This processor's one core as a device. Its links are never used by one rank; they are given memory's figure."""
    single = product_flops(torch.float32) / 1e12
    memory = lookup_bandwidth() / 1e9
    return Hardware(
        device="cpu",
        bf16_tflops=product_flops(torch.bfloat16) / 1e12,
        tf32_tflops=single,
        fp32_tflops=single,
        memory_gb=psutil.virtual_memory().total / 1e9,
        memory_gbs=memory,
        nvlink_gbs=memory,
        network_gbs=memory,
        host_gbs=memory,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        link_efficiency=1.0,
        operator_us=1e6 * operator_seconds(),
        source="measured on this machine, one core, by benchmarks.plan",
    )


def write(path: Path, hardware: Hardware) -> None:
    """A file for ``rayfm plan --hardware``."""
    path.write_text(yaml.safe_dump({"cpu": hardware.dump()}, sort_keys=False))


def compare(store: ExampleStore, name: str) -> Outcome:
    """Milliseconds of a step, predicted and measured."""
    training = TrainingConfig.model_validate({"batch_size": BATCH, "sharding": "table_wise"})
    learners = [Learner(name, model_config(name), ("click",))]
    predicted = estimate(learners, schema(), training, Cluster(1, 1, calibrate()), BATCH, "fp32").step.total
    held = batches_in_memory(store, HELD)
    train_fast_here()
    with single_process_group(), denormals_as_zero():
        step = bare_step(name, training)

        def steps() -> float:
            for batch in islice(cycle(held), STEPS):
                step(batch)
            return STEPS

        steps()
        spent = [timed(steps) for _ in range(REPEATS)]
    wall = statistics.median(one.wall / one.units for one in spent)
    cpu = statistics.median(one.cpu / one.units for one in spent)
    off = [max(predicted, one.wall / one.units) / min(predicted, one.wall / one.units) for one in spent]
    return Outcome(
        statistics.median(off),
        max(predicted, cpu) / min(predicted, cpu),
        f"{1e3 * predicted:.1f} ms/step",
        f"{1e3 * wall:.1f} ms/step",
        (min(off), max(off)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("model", nargs="?", choices=("dlrm", "dcnv2", "deepfm"))
    parser.add_argument("--write", metavar="FILE", type=Path, help="measure this machine alone, and write its figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.write is not None:
        write(arguments.write, calibrate())
    elif arguments.store is None or arguments.model is None:
        parser.error("name a store and a model, or --write FILE")
    else:
        report(compare(ExampleStore(arguments.store), arguments.model))


if __name__ == "__main__":
    main()
