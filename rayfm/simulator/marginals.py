"""What a simulated world looks like in numbers: ``python -m rayfm.simulator.marginals --seeds 0 1 2``.

All numbers are pooled over the periods of a world, after the bootstrap ones; calibrations on considerations are over
the rows that the ranking stage saw (UKDSL 4.1.2).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyarrow as pa

from rayfm.metrics.functions import calibration, ne
from rayfm.schema import Feature, Schema, Table, Task
from rayfm.simulator.config import STAGES, SimulatorConfig
from rayfm.simulator.log import period_tables
from rayfm.simulator.simulation import Simulation
from rayfm.simulator.world import Floats


def _column(table: pa.Table, name: str) -> Floats:
    values: Floats = table[name].to_numpy()
    return values


def _ne(label: Floats, prediction: Floats) -> float:
    known = np.clip(prediction.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -(label * np.log(known) + (1 - label) * np.log(1 - known))
    return float(ne(loss.sum(), label.sum(dtype=np.float64), len(label)))


def measure(config: SimulatorConfig) -> dict[str, float]:
    """The marginals of one world by name."""
    schema = Schema(
        tables={"ad": Table(rows=1)},
        features=(Feature(name="ad_id", kind="sparse", table="ad"),),
        tasks=(Task(name="click"), Task(name="long_view"), Task(name="watch_time", kind="regression")),
        traffics=tuple(traffic.name for traffic in config.traffics),
    )
    started = time.process_time()
    simulation = Simulation(config)
    logs: dict[str, list[pa.Table]] = {"impression": [], "consideration": []}
    served = best = new = 0.0
    for _ in range(config.bootstrap_periods + config.periods):
        before = simulation.world.ad_id.copy()
        record = simulation.step()
        if record.number >= 0:
            for kind, table in period_tables(simulation, record, schema):
                logs[kind].append(table)
            value = simulation.served_value(record)
            served, best = served + value[0], best + value[1]
            new += float((before != simulation.world.ad_id).mean())
    seconds = time.process_time() - started

    shown, considered = (pa.concat_tables(logs[kind]) for kind in ("impression", "consideration"))
    click = _column(shown, "click")
    found: dict[str, float] = {
        "impressions a period": shown.num_rows / config.periods,
        "considerations a period": considered.num_rows / config.periods,
        "click rate": float(click.mean()),
    }
    surface = np.array(shown["traffic"].to_pylist())
    found |= {
        f"click rate, {traffic.name}": float(click[surface == traffic.name].mean()) for traffic in config.traffics
    }
    found["long view rate"] = float(_column(shown, "long_view").mean())
    found["watch time, mean seconds"] = float(_column(shown, "watch_time").mean())
    found["true click rate of considerations"] = float(_column(considered, "truth/click").mean())
    found["ads ended a period"] = new / config.periods
    for stage in STAGES:
        found[f"NE on impressions, {stage}"] = _ne(click, _column(shown, f"logged/{stage}/click"))
    found["NE on impressions, truth"] = _ne(click, _column(shown, "truth/click"))
    seen = considered.filter(considered["logged/ranking/click"].is_valid())
    for name, table in (("impressions", shown), ("considerations", seen)):
        of_ranking, truth = (_column(table, column) for column in ("logged/ranking/click", "truth/click"))
        for stage in STAGES[:-1]:
            said = _column(table, f"logged/{stage}/click")
            ratio = calibration(said.sum(dtype=np.float64), of_ranking.sum(dtype=np.float64))
            found[f"{stage} over ranking, {name}"] = float(ratio)
        found[f"ranking over truth, {name}"] = float(
            calibration(of_ranking.sum(dtype=np.float64), truth.sum(dtype=np.float64))
        )
    found["served value over the best possible"] = served / best
    found["CPU seconds"] = seconds
    return found


def main() -> None:
    """Print a Markdown table, one column a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--periods", type=int, default=SimulatorConfig().periods)
    arguments = parser.parse_args()
    worlds = [measure(SimulatorConfig(seed=seed, periods=arguments.periods)) for seed in arguments.seeds]
    print("| | " + " | ".join(f"seed {seed}" for seed in arguments.seeds) + " | mean |")
    print("| --- |" + " ---: |" * (len(worlds) + 1))
    for name in worlds[0]:
        values = [world[name] for world in worlds]
        cells = [f"{value:.0f}" if value > 1000 else f"{value:.3f}" for value in [*values, float(np.mean(values))]]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
