"""A run directory such as a run of the cascade simulator leaves, made from real metric states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayfm.metrics import Entry, MetricState, bootstrap_weights, lines, summarise

WARM_UP, TEST = ("2024-03-01", "2024-03-02"), tuple(f"2024-03-{day:02}" for day in range(3, 9))
TRAFFICS = ("feed", "search", "reels")
NOISE = {"none": 0.75, "direct": 0.62, "auxiliary": 0.66, "aux+adapter": 0.58}
MODELS = {"two_tower": 0.35, "fm": 0.2, "dlrm": 0.0}
CONFIG = "name: cascade\nschedule:\n  warm_up: 2\nstudents:\n- name: fm\n  model: {type: fm, embedding_dim: 16}\n"


def _entries(rows: int, seeds: int) -> list[Entry]:
    names = [(model, variant, seed) for model in MODELS for variant in NOISE for seed in range(seeds)]
    names.append(("big_dcnv2", "teacher", 0))
    entries = []
    for day, period in enumerate((*WARM_UP, *TEST)):
        g = torch.Generator().manual_seed(day)
        truth = 1.1 * torch.randn(rows, generator=g) - 2.2 + 0.1 * day
        label = (torch.rand(rows, generator=g) < truth.sigmoid()).float()
        shown = torch.rand(rows, generator=g) < 0.6
        user = torch.randint(0, rows // 6, (rows,), generator=g)
        traffic = torch.randint(0, 3, (rows,), generator=g)
        watch, ones = truth + 3 + torch.randn(rows, generator=g), torch.ones(rows)
        copies = bootstrap_weights(user, 60)
        for model, variant, seed in names:
            g.manual_seed(len(model) * 31 + len(variant) + 7 * seed + 1009 * day)
            noise = 0.25 if variant == "teacher" else NOISE[variant] + MODELS[model] + 0.04 * seed
            bias = 0.15 if variant == "direct" else 0.0
            guess = truth + bias + noise * torch.randn(rows, generator=g) - noise**2 / 3
            state = MetricState([("click", "binary"), ("watch_time", "regression")], TRAFFICS, 60, 1024, 256)
            state.update("click", 0, guess, label, shown, ones, traffic, user, copies)
            state.update("click", 1, guess, (truth * 0.9).sigmoid(), ~shown, ones, traffic, user, copies)
            state.update("watch_time", 0, guess + 3, watch, shown, ones, traffic, user, copies)
            entries.append(Entry(model, variant, seed, period, state, {"click": 0.13}))
    return entries


def _progress() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    events: list[dict[str, Any]] = []
    for day, period in enumerate((*WARM_UP, *TEST)):
        marginals = []
        for i, traffic in enumerate(TRAFFICS):
            ctr = (0.08, 0.16, 0.11)[i] + 0.004 * day * (i - 1) + 0.003 * rng.normal()
            truth = {"truth/click": ctr * 1.01, "logged/ranking/click": ctr * 1.05}
            marginals.append(
                {
                    "kind": "impression",
                    "traffic": traffic,
                    "rows": 9000 - 2500 * i,
                    "means": {"click": ctr, "watch_time": 20 * ctr, **truth},
                }
            )
            low = {name: 0.6 * mean for name, mean in truth.items()}
            marginals.append({"kind": "consideration", "traffic": traffic, "rows": 40000 - 9000 * i, "means": low})
        rejected = {"watch_time: not finite": 3 + day, "user_id: negative id": 1} if day % 2 else {}
        events.append(
            {
                "event": "prepared",
                "period": period,
                "rows": {"impression": 19500, "consideration": 93000},
                "rejected": rejected,
                "marginals": marginals,
            }
        )
    for day, period in enumerate((*WARM_UP, *TEST)):
        parts = {
            "wait": 0.4,
            "read": 0.5,
            "predict": 1.2,
            "forward": 3.0,
            "backward": 4.1,
            "optimizer": 1.3,
            "checkpoint": 0.3,
            "publish": 0.4,
            "metrics": 0.6,
        }
        for trainer, factor in (("teacher", 1.0), ("students", 1.7)):
            mine = {part: factor * seconds * (1 + 0.1 * rng.random()) for part, seconds in parts.items()}
            if trainer == "students":
                mine["wait"] += 5
            names = (
                ["big_dcnv2/teacher/click"]
                if trainer == "teacher"
                else [f"{m}/{v}/click" for m in MODELS for v in NOISE]
            )
            losses = {name: 0.36 - 0.004 * day + 0.01 * rng.random() for name in names}
            events.append(
                {
                    "event": "trained",
                    "trainer": trainer,
                    "period": period,
                    "examples": 112500,
                    "seconds": sum(mine.values()),
                    "parts": mine,
                    "losses": losses,
                }
            )
        events.append(
            {"event": "published", "model": "big_dcnv2", "version": f"v{day:04}", "period": period, "seconds": 0.21}
        )
        if day:
            before = (*WARM_UP, *TEST)[day - 1]
            coverage = {"impression": 1.0, "consideration": 0.987 if day == 4 else 1.0}
            events.append(
                {
                    "event": "labelled",
                    "period": period,
                    "teacher": "big_dcnv2",
                    "version": f"v{day - 1:04}",
                    "trained_through": before,
                    "rows": 112500,
                    "labelled": 112500 if day != 4 else 111291,
                    "coverage": coverage,
                    "seconds": 4.2 + rng.random(),
                }
            )
    return events


def write_run(folder: Path, rows: int = 2500, seeds: int = 3) -> Path:
    """Write a whole run directory; returns it."""
    folder.mkdir(parents=True)
    entries = _entries(rows, seeds)
    with (folder / "metrics.jsonl").open("w") as file:
        for entry in entries:
            for line in lines(entry.state, entry.period, entry.model, entry.variant, entry.seed, entry.train_rate):
                file.write(json.dumps(line) + "\n")
    summary = summarise([entry for entry in entries if entry.period in TEST])
    (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False))
    (folder / "progress.jsonl").write_text("".join(json.dumps(event) + "\n" for event in _progress()))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "cascade")
