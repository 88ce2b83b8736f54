"""Workers of one training step: ``python -m benchmarks.scaling`` (``--save`` keeps the figures).

1, 2, 4 and 8 gloo processes take the same steps of the fixed case (one global batch, in float32), with table-wise and
with row-wise tables. Counted for each rank: CPU-seconds of each part of a step, and the bytes of each collective. Wall
time says nothing here, since the workers share the machine's cores. The critical path is the longest rank's time of
each part, summed: a step's time where each worker has a core and links cost what copying costs here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.collectives import BACKWARD, EXCHANGES, Clock, Counted, Sent, closed_form, start
from benchmarks.data import BATCH, EMBEDDING_DIM, SHORT, SPARSE, model_config, schema, write_store
from benchmarks.data import describe as describe_data
from benchmarks.saved import save
from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.planning.estimate import Estimate, estimate
from rayfm.planning.hardware import Hardware
from rayfm.planning.search import Cluster
from rayfm.planning.work import Learner as PlannedLearner
from rayfm.quiet import quiet_libraries
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import Learner, LearnerConfig

WORLDS = (1, 2, 4, 8)
MODELS = ("dlrm", "dcnv2")
SHARDINGS = ("table_wise", "row_wise")
STEPS, WARM = 24, 4
"""Steps that count, and those before them."""
READS = 5
"""Times that all of them are read."""

READ = "read, encode"
PARTS = (
    READ,
    "ids",
    "look-up",
    "vectors forward",
    "dense forward",
    BACKWARD,
    "vectors backward",
    "table update",
    "gradients",
    "optimiser",
    "other",
)
"""A step's parts. Collectives are in ``ids``, ``vectors ...``, ``gradients`` and (sums of losses) ``other``."""


@dataclasses.dataclass
class Rank:
    """What one rank spent on a step."""

    seconds: dict[str, float]
    """Part -> CPU-seconds of all its threads."""
    sent: dict[str, Sent]
    dense_parameters: int


@dataclasses.dataclass
class Case:
    """A model, a kind of sharding and a number of workers."""

    model: str
    sharding: str
    world: int
    ranks: list[Rank]

    @property
    def critical(self) -> dict[str, float]:
        """Part -> the longest rank's seconds."""
        return {part: max(rank.seconds.get(part, 0.0) for rank in self.ranks) for part in PARTS}

    @property
    def imbalance(self) -> dict[str, float]:
        """Part -> the longest rank's seconds over the ranks' mean, minus 1."""
        means = {part: statistics.mean(rank.seconds.get(part, 0.0) for rank in self.ranks) for part in PARTS}
        return {part: longest / means[part] - 1 for part, longest in self.critical.items() if means[part]}

    def sent(self, kind: str, what: str = "size") -> tuple[float, float]:
        """Bytes of a step that a rank sends: the mean of ranks, and the most."""
        found = [getattr(rank.sent.get(kind, Sent()), what) for rank in self.ranks]
        return statistics.mean(found), max(found)


def speed_up(one: dict[str, float], many: dict[str, float]) -> float:
    """How many times shorter a critical path is than one worker's."""
    return sum(one.values()) / sum(many.values())


def cost_of_waiting(case: Case) -> tuple[str, float]:
    """The part in which ranks differ most, and the seconds a step by which its longest is above the mean."""
    above = {part: case.critical[part] * (1 - 1 / (1 + share)) for part, share in case.imbalance.items()}
    part = max(above, key=lambda name: above[name])
    return part, above[part]


# -- in each worker -------------------------------------------------------------------------------------------------


def watch(learner: Learner, clock: Clock) -> None:
    """Make a learner's modules charge their parts of a step."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

    def looked_up(module: Any, inputs: Any, output: torch.Tensor) -> None:
        clock.leave()
        clock.turn("vectors forward")
        node = output.grad_fn
        assert node is not None
        node.register_prehook(lambda gradients: clock.enter("table update"))  # the optimiser is fused into it
        node.register_hook(lambda gradients, outputs: clock.leave())

    for module in learner.dmp.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            module.register_forward_pre_hook(lambda module, inputs: clock.enter("ids"))
            module.register_forward_hook(lambda module, inputs, output: clock.leave())
            for kernel in itertools.chain.from_iterable(lookup.modules() for lookup in module._lookups):
                if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
                    kernel.register_forward_pre_hook(lambda module, inputs: clock.enter("look-up"))
                    kernel.register_forward_hook(looked_up)
    learner.dmp.register_forward_pre_hook(lambda module, inputs: clock.turn("dense forward"))
    learner.dmp.register_forward_hook(lambda module, inputs, output: clock.turn(BACKWARD))
    step = learner.optimizers.step

    def stepped() -> None:
        clock.turn("optimiser")
        step()
        clock.turn("other")

    learner.optimizers.step = stepped  # type: ignore[method-assign]


def work(rank: int, world: int, folder: str, store: str, cases: Sequence[tuple[str, str]]) -> None:
    """One worker: read its part of the steps, then take them with each model and sharding."""
    quiet_libraries()
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    group = start(rank, world, Path(folder) / "meet")
    encoder = Encoder(schema())
    plan = ReadPlan(ExampleStore(store), tuple(encoder.columns), BATCH)
    passes, held = [], list[Batch]()
    for _ in range(READS):
        group.barrier().wait()
        group.clock.reset()
        group.clock.turn(READ)
        held = list(ArrowReader(plan, encoder, rank, world).batches(SHORT))
        group.clock.turn("other")
        passes.append(group.clock.seconds[READ] / len(held))
    read = statistics.median(passes)
    for model, sharding in cases:
        found = steps_of(group, model, sharding, held, Path(folder))
        found.seconds[READ] = read
        name = f"{model}.{sharding}.{rank}.json"
        (Path(folder) / name).write_text(json.dumps(dataclasses.asdict(found)))
    group.barrier().wait()
    dist.destroy_process_group()


def steps_of(group: Counted, model: str, sharding: str, held: list[Batch], folder: Path) -> Rank:
    """This rank's median step over the batches, the first few left out; its bytes are the mean's."""
    training = TrainingConfig.model_validate({"batch_size": BATCH, "sharding": sharding})
    config = LearnerConfig(model_name=model, variant=sharding, seed=1, model=model_config(model), tasks=("click",))
    learner = Learner(config, training, schema(), torch.device("cpu"), folder / f"{model}.{sharding}.plan")
    watch(learner, group.clock)
    steps: list[dict[str, float]] = []
    for position, batch in enumerate(held):
        if position == WARM:
            group.sent.clear()
        group.clock.reset()
        learner.train_step(batch, position)
        group.clock.turn("other")
        steps.append(dict(group.clock.seconds))
    del steps[:WARM]
    for step in steps:
        step["other"] += sum(step.pop(part) for part in list(step) if part not in PARTS)
    # The median: other work on the machine shows in caches, and so in CPU-seconds, of some steps.
    seconds = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS}
    sent = {
        kind: Sent(*(value / len(steps) for value in dataclasses.astuple(whole)))  # type: ignore[arg-type]
        for kind, whole in group.sent.items()
    }
    tables = {f"c{feature}" for feature in range(SPARSE)}
    dense = sum(
        parameter.numel()
        for name, parameter in learner.dmp.named_parameters()
        if name.removesuffix(".weight").rpartition(".")[2] not in tables
    )
    return Rank(seconds, sent, dense)


# -- around them ----------------------------------------------------------------------------------------------------


def run_world(store: Path, world: int, cases: Sequence[tuple[str, str]]) -> list[Case]:
    """The cases on ``world`` workers.

    A worker alone gets company, another one that does the same: two cores of a processor share what they run on, and
    with more workers no core is ever idle either.
    """
    with tempfile.TemporaryDirectory() as folder:
        groups = [Path(folder) / name for name in ("counted", "company")[: 2 if world == 1 else 1]]
        for group in groups:
            group.mkdir()
        with ThreadPoolExecutor() as pool:
            arguments = [(world, str(group), str(store), cases) for group in groups]
            running = [pool.submit(torch.multiprocessing.spawn, work, given, world) for given in arguments]
            for one in running:
                one.result()
        return [
            Case(model, sharding, world, [load_rank(groups[0] / f"{model}.{sharding}.{r}.json") for r in range(world)])
            for model, sharding in cases
        ]


def load_rank(path: Path) -> Rank:
    """What a worker wrote."""
    found = json.loads(path.read_text())
    sent = {kind: Sent(**value) for kind, value in found["sent"].items()}
    return Rank(found["seconds"], sent, found["dense_parameters"])


def planned(model: str, sharding: str, world: int) -> dict[str, float]:
    """Bytes a rank and step by `rayfm plan`'s model of the links.

    Its seconds on a device all of whose links carry 1 GB/s and start at once are gigabytes.
    """
    unit = Hardware(
        device="cpu",
        bf16_tflops=1,
        tf32_tflops=1,
        fp32_tflops=1,
        memory_gb=1e3,
        memory_gbs=1,
        nvlink_gbs=1,
        network_gbs=1,
        host_gbs=1,
        link_efficiency=1,
        hop_us=0,
        source="one of each, to read seconds as gigabytes",
    )
    found: Estimate = estimate(
        [PlannedLearner(model, model_config(model), ("click",))],
        schema(),
        TrainingConfig.model_validate({"batch_size": BATCH, "sharding": sharding}),
        Cluster(1, world, unit),
        BATCH // world,
        "fp32",
    )
    step = found.step
    times = (step.ids_all_to_all, step.vectors_forward, step.vectors_backward, step.dense_all_reduce)
    return {kind: 1e9 * seconds for kind, seconds in zip(EXCHANGES, times, strict=True)}


def describe(case: Case, one: Case) -> dict[str, Any]:
    """A case as figures: milliseconds and bytes a step."""
    arithmetic = closed_form(case.sharding, case.world, BATCH, SPARSE, EMBEDDING_DIM, case.ranks[0].dense_parameters)
    plan = planned(case.model, case.sharding, case.world)
    part, waited = cost_of_waiting(case)
    return {
        "model": case.model,
        "sharding": case.sharding,
        "workers": case.world,
        "dense_parameters": case.ranks[0].dense_parameters,
        "critical_ms": {name: round(1e3 * seconds, 3) for name, seconds in case.critical.items()},
        "path_ms": round(1e3 * sum(case.critical.values()), 2),
        "cpu_ms": round(1e3 * sum(sum(rank.seconds.values()) for rank in case.ranks), 2),
        "speed_up": round(speed_up(one.critical, case.critical), 3),
        "imbalance": {name: round(share, 3) for name, share in case.imbalance.items()},
        "worst": [part, round(1e3 * waited, 3)],
        "bytes": {
            kind: {
                "mean": round(case.sent(kind)[0]),
                "most": round(case.sent(kind)[1]),
                "wire": round(case.sent(kind, "wire")[0]),
                "calls": case.sent(kind, "calls")[0],
                "arithmetic": round(arithmetic[kind]),
                "plan": round(plan[kind]),
            }
            for kind in EXCHANGES
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The cases as text, at most 100 columns."""
    lines = [f"{'':<18}{'workers':>8}{'path':>9}{'speed-up':>10}{'MB sent':>9}{'wire':>8}{'plan':>8}  ranks differ in"]
    for row in rows:
        size, wire, plan = (sum(v[k] for v in row["bytes"].values()) / 1e6 for k in ("mean", "wire", "plan"))
        part, waited = row["worst"]
        lines.append(
            f"{row['model'] + ' ' + row['sharding']:<18}{row['workers']:>8}{row['path_ms']:>6.1f} ms"
            f"{row['speed_up']:>10.2f}{size:>9.2f}{wire:>8.2f}{plan:>8.2f}  {part} (+{waited:.2f} ms)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of workers; 1 among them")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    arguments = parser.parse_args()
    if 1 not in arguments.worlds:
        parser.error("--worlds leaves out 1, which the others are compared with")
    quiet_libraries()
    cases = [(model, sharding) for model in MODELS for sharding in SHARDINGS]
    found: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="rayfm-bench-") as folder:
        write_store(Path(folder), {SHORT: BATCH * (arguments.steps + WARM)})
        for world in arguments.worlds:
            print(f"{world} workers ...", file=sys.stderr, flush=True)
            found += run_world(Path(folder), world, cases)
    ones = {(case.model, case.sharding): case for case in found if case.world == 1}
    rows = [describe(case, ones[case.model, case.sharding]) for case in found]
    rows.sort(key=lambda row: (MODELS.index(row["model"]), SHARDINGS.index(row["sharding"]), row["workers"]))
    print(table(rows))
    if arguments.save:
        save("scaling", {"case": describe_data(), "steps": arguments.steps, "cases": rows})


if __name__ == "__main__":
    main()
