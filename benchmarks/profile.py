"""Where the time of a training step and of a period goes: ``python -m benchmarks.profile [STORE] [--figure OUT.svg]``.

A step, per part: reading (Parquet to Arrow), encoding (hashing, transforms), collating (a step's rows to tensors),
exchanging ids and vectors (what TorchRec does around the look-ups, also with one worker), looking up, the rest of the
forward, the objectives, the backward without tables, the tables' backward with their fused optimiser, the optimiser,
and what is left of the step. Milliseconds a step of one thread; clocks around calls, no tracing, so that
the parts add up to what an unprofiled step takes.

A period, per part: as the training loop's own record has it, of the fixed case's long period, predicted and trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.types import ShardedModule

from benchmarks.data import BATCH, LONG, SHORT, model_config, schema, write_store
from benchmarks.training import Free
from rayfm.data.encode import Encoder
from rayfm.data.reader import chunk_steps
from rayfm.data.steps import LaneCache, ReadPlan, count_steps, read_steps
from rayfm.data.store import ExampleStore
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import Learner, LearnerConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import single_process_group

CASES = (
    ("dlrm", "fp32", BATCH),
    ("dlrm", "bf16", BATCH),
    ("dcnv2", "fp32", BATCH),
    ("dcnv2", "bf16", BATCH),
    ("dlrm", "fp32", 256),
    ("dcnv2", "fp32", 256),
)
STEPS = 24
WARM = 6
PARTS = (
    "read",
    "encode",
    "collate",
    "exchange",
    "look-up",
    "dense forward",
    "objectives",
    "dense backward",
    "tables' backward",
    "optimiser",
    "rest of the step",
)
PERIOD_PARTS = ("wait", "read", "predict", "metrics", "forward", "backward", "optimizer", "checkpoint", "publish")


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((*PARTS, "forward", "collections"), 0.0)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def around(self, owner: Any, name: str, part: str) -> None:
        """Time every call of a method of one object."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(part):
                return call(*args, **kwargs)

        setattr(owner, name, timed)


def watch(clock: Clock, learner: Learner) -> None:
    """Put clocks around the parts of a learner's step."""
    clock.around(learner.module, "predict", "forward")
    for objective in learner.module.objectives:
        clock.around(objective, "forward", "objectives")
    for sharded in learner.module.modules():
        if isinstance(sharded, ShardedModule):
            clock.around(sharded, "forward", "collections")
            _watch_tables(clock, sharded)


def _watch_tables(clock: Clock, sharded: Any) -> None:
    """Time the look-ups of a sharded collection, and the nodes of the graph that are their backward."""
    for lookup in sharded._lookups:
        _watch_table(clock, lookup)


def _watch_table(clock: Clock, lookup: Any) -> None:
    call = lookup.forward
    started = [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        clock.seconds["tables' backward"] += time.perf_counter() - started[0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.timed("look-up"):
            output = call(*args, **kwargs)
        output.grad_fn.register_prehook(before)
        output.grad_fn.register_hook(after)
        return output

    lookup.forward = timed


def reading(store: ExampleStore, size: int) -> tuple[dict[str, float], list[Any]]:
    """Seconds a step of reading, encoding and collating the long period, and the first batches."""
    encoder = Encoder(schema())
    plan = ReadPlan(store, tuple(encoder.columns), size)
    cache = LaneCache(plan)
    manifest = cache.manifest(LONG)
    steps, chunk = min(count_steps(plan, manifest), 8 * chunk_steps(plan)), chunk_steps(plan)
    clock, batches = Clock(), []
    for first in range(0, steps, chunk):
        last = min(steps, first + chunk)
        with clock.timed("read"):
            rows = read_steps(plan, cache, LONG, range(manifest.lanes), first, last)
        with clock.timed("encode"):
            encoded = encoder.encode(rows.table, rows.kind, rows.supervision, rows.supervision_mask)
        for step in range(last - first):
            with clock.timed("collate"):
                batch = encoder.batch(encoded, step * size, (step + 1) * size)
            if len(batches) < WARM + STEPS:
                batches.append(batch)
    return {part: clock.seconds[part] / steps for part in ("read", "encode", "collate")}, batches


def step_parts(store: ExampleStore, name: str, precision: str, size: int) -> dict[str, float]:
    """Milliseconds a step by part."""
    seconds, batches = reading(store, size)
    training = TrainingConfig.model_validate({"batch_size": size, "precision": precision})
    config = LearnerConfig(model_name=name, variant="none", seed=1, model=model_config(name), tasks=("click",))
    with tempfile.TemporaryDirectory() as folder, single_process_group():
        learner = Learner(config, training, schema(), torch.device("cpu"), Path(folder) / "plan.json")
        clock = Clock()
        for step, batch in enumerate(batches[:WARM]):
            learner.train_step(batch, step)
        watch(clock, learner)
        learner.clock = type(learner.clock)()
        started = time.perf_counter()
        for step, batch in enumerate(batches[WARM:]):
            learner.train_step(batch, WARM + step)
        total = time.perf_counter() - started
        own = learner.clock
    spent = clock.seconds
    parts = {
        "exchange": spent["collections"] - spent["look-up"],
        "look-up": spent["look-up"],
        "dense forward": spent["forward"] - spent["collections"],
        "objectives": spent["objectives"],
        "dense backward": own.backward - spent["tables' backward"],
        "tables' backward": spent["tables' backward"],
        "optimiser": own.optimizer,
    }
    parts["rest of the step"] = total - sum(parts.values())
    parts = {part: value / len(batches[WARM:]) for part, value in parts.items()}
    return {part: 1e3 * {**seconds, **parts}[part] for part in PARTS}


def period_parts(store: ExampleStore, name: str) -> dict[str, float]:
    """Seconds of the long period by part, of a run over both periods with its checkpoints and snapshots."""
    learner = LearnerConfig(model_name=name, variant="none", seed=1, model=model_config(name), tasks=("click",))
    with tempfile.TemporaryDirectory() as folder, single_process_group():
        spec = TrainerSpec(
            name="profile",
            role="students",
            learners=(learner,),
            training=TrainingConfig.model_validate({"batch_size": BATCH}),
            schema_=schema(),
            periods=(SHORT, LONG),
            store=str(store.root),
            run_dir=folder,
        )
        TrainingLoop(spec, Free()).run()
        (path,) = Path(folder).rglob(f"periods/{LONG}.json")
        record = json.loads(path.read_text())
    parts: dict[str, float] = {part: record["parts"].get(part, 0.0) for part in PERIOD_PARTS}
    return {**parts, "rest": record["seconds"] - sum(parts.values())}


def show(title: str, unit: str, parts: dict[str, float]) -> None:
    total = sum(parts.values())
    print(f"{title}: {total:.1f} {unit}")
    for part, value in parts.items():
        print(f"  {part:<18}{value:>9.2f} {unit} {value / total:>6.1%} {'#' * round(40 * value / total)}")


def draw(path: Path, steps: dict[str, dict[str, float]], periods: dict[str, dict[str, float]]) -> None:
    """Shares of the parts as stacked bars, one for each case."""
    import matplotlib
    from matplotlib.figure import Figure

    from rayfm.report.figures import PALETTE

    with matplotlib.rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "profile"}):
        figure = Figure(figsize=(8.0, 4.6), layout="constrained")
        for axes, (cases, unit, title) in zip(
            figure.subplots(2, 1, height_ratios=[len(steps), len(periods) + 1]),
            ((steps, "ms", "One training step"), (periods, "s", "A period of 786,432 rows, predicted and trained")),
            strict=True,
        ):
            names = list(next(iter(cases.values())))
            colours = itertools.cycle((*PALETTE[1:], PALETTE[0]))
            left = dict.fromkeys(cases, 0.0)
            for name, colour in zip(names, colours, strict=False):
                shares = [parts[name] / sum(parts.values()) for parts in cases.values()]
                axes.barh(list(cases), shares, left=list(left.values()), color=colour, label=name)
                left = {case: left[case] + share for case, share in zip(cases, shares, strict=True)}
            axes.set_yticks(
                range(len(cases)), [f"{case}, {sum(parts.values()):.0f} {unit}" for case, parts in cases.items()]
            )
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
            axes.set_title(title, loc="left", fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
    parser.add_argument("store", nargs="?", type=Path, help="a store that benchmarks.data wrote; else one is written")
    parser.add_argument("--figure", type=Path, help="write the picture here (SVG)")
    parser.add_argument("--only", default="", help="cases whose name begins so, e.g. 'dlrm fp32'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rayfm-profile-") as folder:
        store = ExampleStore(arguments.store) if arguments.store else write_store(Path(folder))
        cases = {f"{name} {precision}, batch {size:,}": (name, precision, size) for name, precision, size in CASES}
        cases = {case: rest for case, rest in cases.items() if case.startswith(arguments.only)}
        steps: dict[str, dict[str, float]] = {}
        for case, (name, precision, size) in cases.items():
            steps[case] = step_parts(store, name, precision, size)
            show(case, "ms", steps[case])
        periods = {name: period_parts(store, name) for name in dict.fromkeys(name for name, _, _ in cases.values())}
        for name, parts in periods.items():
            show(f"period, {name} fp32", "s", parts)
    if arguments.figure:
        draw(arguments.figure, steps, periods)


if __name__ == "__main__":
    main()
