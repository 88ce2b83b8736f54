"""Where the time of a training step and of a period goes: ``python -m benchmarks.profile [STORE] [--figures FOLDER]``.

A step, per part, in CPU-milliseconds of one worker with one thread: reading (Parquet to Arrow), encoding (hashing,
transforms), collating (a step's rows to tensors), then the parts that `benchmarks.scaling` tells apart. No tracing: the
parts add up to what an unprofiled step takes.

A period, per part: as the training loop's own record has it, of the fixed case's long period, predicted and trained.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.collectives import Clock
from benchmarks.data import BATCH, LONG, SHORT, model_config, schema, write_store
from benchmarks.figures import COLOURS, MODEL_NAMES, draw
from benchmarks.scaling import PARTS as STEP_PARTS
from benchmarks.scaling import READ, watch
from benchmarks.training import Free
from rayfm.data.encode import Encoder
from rayfm.data.reader import chunk_steps
from rayfm.data.steps import LaneCache, ReadPlan, count_steps, read_steps
from rayfm.data.store import ExampleStore
from rayfm.report.figures import PALETTE
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import Learner, LearnerConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import single_process_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
READING = {"read": "#4a4e55", "encode": "#7d828a", "collate": "#a7abb2"}
STEP_COLOURS = READING | {part: colour for part, colour in COLOURS.items() if part != READ}
PERIOD_COLOURS = {
    "wait": "#4a4e55",
    "read": "#a7abb2",
    "predict": PALETTE[2],
    "metrics": PALETTE[4],
    "forward": "#7cc0f0",
    "backward": PALETTE[1],
    "optimizer": PALETTE[5],
    "checkpoint": PALETTE[3],
    "publish": "#d64545",
    "rest": "#dfe1e5",
}


def reading(store: ExampleStore, size: int) -> tuple[dict[str, float], list[Any]]:
    """CPU-seconds a step of reading, encoding and collating the long period, and the first batches."""
    encoder = Encoder(schema())
    plan = ReadPlan(store, tuple(encoder.columns), size)
    cache = LaneCache(plan)
    manifest = cache.manifest(LONG)
    steps, chunk = min(count_steps(plan, manifest), 8 * chunk_steps(plan)), chunk_steps(plan)
    clock, batches = Clock(), []
    for first in range(0, steps, chunk):
        last = min(steps, first + chunk)
        clock.turn("read")
        rows = read_steps(plan, cache, LONG, range(manifest.lanes), first, last)
        clock.turn("encode")
        encoded = encoder.encode_steps(rows)
        clock.turn("collate")
        for step in range(last - first):
            batch = encoder.batch(encoded, step * size, (step + 1) * size)
            if len(batches) < WARM + STEPS:
                batches.append(batch)
    clock.turn("other")
    return {part: clock.seconds[part] / steps for part in READING}, batches


def step_parts(store: ExampleStore, name: str, precision: str, size: int) -> dict[str, float]:
    """CPU-milliseconds a step by part."""
    read, batches = reading(store, size)
    training = TrainingConfig.model_validate({"batch_size": size, "precision": precision})
    config = LearnerConfig(model_name=name, variant="none", seed=1, model=model_config(name), tasks=("click",))
    taken: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, single_process_group():
        learner = Learner(config, training, schema(), torch.device("cpu"), Path(folder) / "plan.json")
        clock = Clock()
        watch(learner, clock)
        for step, batch in enumerate(batches):
            clock.reset()
            learner.train_step(batch, step)
            clock.turn("other")
            taken.append(dict(clock.seconds))
    # A part that has no colour of its own (nothing here) would be lost from the sum: it is counted as other.
    for one in taken:
        one["other"] += sum(one.pop(part) for part in list(one) if part not in STEP_PARTS)
    own = {part: statistics.median(one.get(part, 0.0) for one in taken[WARM:]) for part in STEP_PARTS if part != READ}
    return {part: 1e3 * value for part, value in (read | own).items()}


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
    parts: dict[str, float] = {part: record["parts"].get(part, 0.0) for part in PERIOD_COLOURS if part != "rest"}
    return {**parts, "rest": record["seconds"] - sum(parts.values())}


def show(title: str, unit: str, parts: dict[str, float]) -> None:
    total = sum(parts.values())
    print(f"{title}: {total:.1f} {unit}")
    for part, value in parts.items():
        print(f"  {part:<18}{value:>9.2f} {unit} {value / total:>6.1%} {'#' * round(40 * value / total)}")


def shares(
    cases: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], title: str, unit: str, axes: Axes
) -> None:
    """A stacked bar of shares for each case."""
    names = [f"{case}, {sum(parts.values()):.0f} {unit}" for case, parts in cases.items()]
    left = [0.0] * len(names)
    for part, colour in colours.items():
        widths = [100 * parts[part] / sum(parts.values()) for parts in cases.values()]
        axes.barh(names, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set(xlabel="%", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
    parser.add_argument("store", nargs="?", type=Path, help="a store that benchmarks.data wrote; else one is written")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the pictures here")
    parser.add_argument("--only", default="", help="cases whose name begins so, e.g. 'dlrm fp32'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rayfm-profile-") as folder:
        store = ExampleStore(arguments.store) if arguments.store else write_store(Path(folder))
        cases = {
            f"{MODEL_NAMES[name]} {precision}, batch {size:,}": (name, precision, size)
            for name, precision, size in CASES
        }
        cases = {case: rest for case, rest in cases.items() if case.lower().startswith(arguments.only.lower())}
        steps: dict[str, dict[str, float]] = {}
        for case, (name, precision, size) in cases.items():
            steps[case] = step_parts(store, name, precision, size)
            show(case, "ms", steps[case])
        periods = {name: period_parts(store, name) for name in dict.fromkeys(name for name, _, _ in cases.values())}
        for name, parts in periods.items():
            show(f"period, {name} fp32", "s", parts)
    if arguments.figures:
        title = "One training step, one thread"
        paint = functools.partial(shares, steps, STEP_COLOURS, title, "ms")
        draw(arguments.figures / "profile_step.svg", title, (8.0, 3.4), paint)
        title = "A period of 786,432 rows, predicted and trained"
        named = {f"{MODEL_NAMES[name]} fp32": parts for name, parts in periods.items()}
        paint = functools.partial(shares, named, PERIOD_COLOURS, title, "s")
        draw(arguments.figures / "profile_period.svg", title, (8.0, 2.3), paint)


if __name__ == "__main__":
    main()
