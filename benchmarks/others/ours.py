"""One run of rayfm: ``python -m benchmarks.others.ours prepare|train|plain CASE WORK [MODEL PRECISION SEED]``.

``prepare`` is rayfm's, from the flat Parquet into an example store. ``train`` is its training loop over the one period
and its prediction of the next one. ``plain`` times that loop and a plain TorchRec one in turns (plain.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spent, rates, timed
from benchmarks.others.cases import Case, model_mapping, open_case
from benchmarks.others.phases import say
from benchmarks.training import Free
from rayfm.data.batch import IMPRESSION
from rayfm.data.store import ExampleStore
from rayfm.metrics import MetricState
from rayfm.metrics.pool import metric_values
from rayfm.quiet import collect_less
from rayfm.training.config import TrainingConfig
from rayfm.training.learner import LearnerConfig
from rayfm.training.loop import PeriodParts, TrainingLoop
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import single_process_group


def training_config(case: Case, model: str, precision: str) -> TrainingConfig:
    """The defaults but for the learning rates; the warm-up is that of examples/kuairand.yaml."""
    warmup = 50 if case.name == "kuairand" else 0
    rates = case.rates(model)
    return TrainingConfig.model_validate(
        {
            "batch_size": case.sizes.batch,
            "precision": precision,
            "warmup_steps": warmup,
            "tables": {"lr": rates.tables},
            "dense": {"lr": rates.dense},
        }
    )


def prepare(case: Case) -> None:
    """Write the example store."""
    from rayfm.data.cluster import cluster_resources
    from rayfm.data.prepare import prepare as write_store
    from rayfm.data.sources.parquet import ParquetConfig, ParquetSource
    from rayfm.pipeline.config import RayConfig
    from rayfm.pipeline.session import ray_session

    source = ParquetSource(ParquetConfig(path=f"{case.folder}/t*/*.parquet"), case.schema)
    with ray_session(RayConfig()):
        say("start", "prepare")
        cpus = int(cluster_resources()[0])
        manifests = write_store(source, case.schema, ExampleStore(case.folder / "store"), tasks=cpus)
        rows = [manifest.rows("impression") for manifest in manifests]
        say("stop", "prepare", sum(rows))
        if rows != [case.rows("train"), case.rows("test")]:
            raise RuntimeError(f"{case.folder / 'store'} has {rows} rows")
        say("result", "{}")


@contextlib.contextmanager
def training_loop(case: Case, model: str, precision: str, seed: int) -> Iterator[TrainingLoop]:
    """rayfm's training loop over the case, before its first step."""
    learner = LearnerConfig.model_validate(
        {
            "model_name": model,
            "variant": "none",
            "seed": seed,
            "model": model_mapping(model, case.sizes),
            "tasks": ("click",),
        }
    )
    with tempfile.TemporaryDirectory() as folder, single_process_group():
        spec = TrainerSpec(
            name="others",
            role="students",
            learners=(learner,),
            training=training_config(case, model, precision),
            schema_=case.schema,
            periods=case.periods,
            store=str(case.folder / "store"),
            run_dir=folder,
            replicates=0,
        )
        yield TrainingLoop(spec, Free())


def train_period(loop: TrainingLoop) -> int:
    """The loop's own method, so that its start, checkpoint and publishing stay out of the figure."""
    return loop._train(0, 0, {}, None, PeriodParts())


def score(loop: TrainingLoop, case: Case) -> dict[str, float]:
    """The loop's own metrics of the held-out rows, by its own prediction."""
    loop._predict(case.periods[1], PeriodParts())
    (file,) = (loop.spec.folder / "metrics" / case.periods[1]).glob("*.npz")
    cell = MetricState.load(file).cell(IMPRESSION, "click")
    sums, histogram = cell.sums.numpy().sum(0), cell.histogram.numpy().sum(0)
    values = metric_values("binary", sums, histogram, math.nan)
    return {name: float(values[name]) for name in ("auc", "logloss")}


def parameters(loop: TrainingLoop) -> dict[str, int]:
    """How many the tables have, and all else."""
    tables = dense = 0
    for name, value in loop.learners[0].dmp.state_dict().items():
        if "embedding_bags" in name:
            tables += math.prod(value.size())
        else:
            dense += value.numel()
    return {"table_parameters": tables, "dense_parameters": dense}


def train(case: Case, model: str, precision: str, seed: int) -> None:
    """One pass over the training part, then the held-out part."""
    with training_loop(case, model, precision, seed) as loop:
        say("start", "train")
        rows = train_period(loop)
        say("stop", "train", rows)
        say("start", "predict")
        found = score(loop, case)
        say("stop", "predict", case.rows("test"))
        say("result", json.dumps(found | parameters(loop)))


def plain(case: Case, model: str, precision: str, seed: int) -> dict[str, Any]:
    """rayfm's loop from its store and a plain one from memory, in turns; the first pass of each is scored."""
    from benchmarks.others.plain import PlainLoop

    with training_loop(case, model, precision, seed) as loop:
        other = PlainLoop(case, model, seed, training_config(case, model, precision))
        # A pass is long, so none is spent on warming up; the second pair is in the other order.
        first = timed(lambda: train_period(loop)), timed(other.train)
        scores = {"auc": score(loop, case)["auc"], "other_auc": other.score()}
        theirs = timed(other.train)
        pairs: list[tuple[Spent, Spent]] = [first, (timed(lambda: train_period(loop)), theirs)]
        outcome = rates(pairs, "examples")
        shown = [statistics.median(s.units / s.cpu for s in side) for side in zip(*pairs, strict=True)]
        return {"wall": outcome.ratio, "cpu": outcome.cpu, "rate": shown[0], "other_rate": shown[1], **scores}


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    collect_less()  # as the command line does
    torch.set_num_threads(1)
    case = open_case(sys.argv[2], Path(sys.argv[3]))
    if sys.argv[1] == "prepare":
        prepare(case)
    elif sys.argv[1] == "train":
        train(case, *sys.argv[4:6], int(sys.argv[6]))
    else:
        say("result", json.dumps(plain(case, *sys.argv[4:6], int(sys.argv[6]))))


if __name__ == "__main__":
    main()
