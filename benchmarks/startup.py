"""What a run costs before it trains, and for each period: ``python -m benchmarks.startup [--only imports ray run]``.

* ``imports``: fresh processes that import one thing each.
* ``ray``: `ray.init` on this machine, its first task, its first actor with torch.
* ``run``: ``rayfm run`` over few and over many small periods, of 2,000 rows. The line through both has what a run costs
  whatever its length (processes, imports, Ray, worker groups, the report) and what each period costs, however small
  (look-ups, checkpoint, snapshot, labels).

``--save`` keeps the figures under ``benchmarks/results/``.

Wall seconds, and CPU-seconds of the whole machine, since Ray's processes are nobody's children: run it on a quiet one.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from benchmarks.data import DAY, START, block, schema
from benchmarks.saved import save

IMPORTS = (
    "rayfm.cli.main",
    "pyarrow.dataset",
    "torch",
    "torchrec",
    "ray",
    "ray.data",
    "ray.train",
    "ray.serve",
    "rayfm.training.loop",
    "rayfm.serving.teacher",
)
COMMAND = "import sys; from rayfm.cli.main import main; sys.exit(main())"
PERIODS = (4, 12)
ROWS = 2_000
BATCH = 256


def spent(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds of ``work``, and CPU-seconds of everything on the machine meanwhile."""
    before, started = psutil.cpu_times(), time.perf_counter()
    work()
    wall, after = time.perf_counter() - started, psutil.cpu_times()
    return wall, (after.user - before.user) + (after.system - before.system) + (after.nice - before.nice)


def python(*arguments: str, **environment: str) -> None:
    """Run python on this checkout; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


class Shown(dict[str, dict[str, float]]):
    """What was timed -> its seconds, each printed as it comes."""

    def show(self, what: str, figures: tuple[float, float]) -> None:
        print(f"{what:<58}{figures[0]:>8.2f} s {figures[1]:>8.2f} CPU-s", flush=True)
        self[what.strip()] = {"wall_s": round(figures[0], 3), "cpu_s": round(figures[1], 3)}


def imports(found: Shown) -> None:
    found.show("python, nothing imported", spent(lambda: python("-c", "pass")))
    for name in IMPORTS:
        python("-c", f"import {name}")  # the files are in the page cache from here on
        found.show(f"import {name}", spent(lambda name=name: python("-c", f"import {name}")))
    found.show("rayfm --help", spent(lambda: python("-c", COMMAND, "--help")))


def ray_itself(found: Shown) -> None:
    import ray

    def actor() -> None:
        class Torch:
            def version(self) -> str:
                import torch

                return str(torch.__version__)

        ray.get(ray.remote(num_cpus=0)(Torch).remote().version.remote())

    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    found.show("ray.init", spent(lambda: ray.init(address="local", **options)))
    found.show("its first task", spent(lambda: ray.get(ray.remote(lambda: 1).remote())))
    found.show("its first actor that imports torch", spent(actor))
    found.show("ray.shutdown", spent(ray.shutdown))


def config(folder: Path, log: Path, teacher: bool) -> Path:
    """A pipeline over the log: one student, with a teacher whose labels it learns from or without."""
    learned = schema().dump()
    students: dict[str, Any] = {
        "dlrm": {"model": {"type": "dlrm"}, "tasks": ["click"], "variants": {"none": []}},
    }
    if teacher:
        students["dlrm"]["variants"] = {"direct": [{"type": "direct", "teacher": "big"}]}
    content = {
        "name": "startup",
        "storage": str(folder / "data"),
        "runs": str(folder / "runs"),
        "data": {
            "source": {
                "type": "parquet",
                "path": str(log),
                "time": {"column": "time", "unit": "us"},
                "example_id": "example_id",
            },
            "lanes": 4,
        },
        "schema": learned,
        "schedule": {"warmup": 1},
        "teachers": {"big": {"model": {"type": "dcnv2"}, "training": {"batch_size": BATCH}}} if teacher else {},
        "groups": {"students": {"batch_size": BATCH}},
        "students": students,
        "evaluation": {"replicates": 10},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_log(folder: Path, periods: int) -> Path:
    """A file a day, in the columns of the fixed case."""
    folder.mkdir(parents=True)
    step = int(DAY / datetime.timedelta(microseconds=1)) // ROWS
    for day in range(periods):
        start = round((START + day * DAY).timestamp() * 1e6)
        table = block(ROWS, 0, start, step, seed=day)
        ids = table["example_id"].to_numpy() + day * ROWS
        table = table.set_column(table.column_names.index("example_id"), "example_id", [ids]).drop_columns(["traffic"])
        pq.write_table(table, folder / f"{day:03d}.parquet")
    return folder


def runs(root: Path, shown: Shown) -> None:
    for teacher in (False, True):
        name = f"rayfm run, {'a teacher, its labels, a student' if teacher else 'a student alone'}"
        found = {}
        for periods in PERIODS:
            folder = root / f"{'with' if teacher else 'without'}-{periods}"
            path = config(folder, write_log(folder / "log", periods), teacher)
            found[periods] = spent(lambda path=path: python("-c", COMMAND, "run", str(path)))
            shown.show(f"{name}, {periods} periods", found[periods])
        few, many = (found[periods] for periods in PERIODS)
        each = tuple((b - a) / (PERIODS[1] - PERIODS[0]) for a, b in zip(few, many, strict=True))
        shown.show(f"{name}: each period", (each[0], each[1]))
        shown.show(f"{name}: once", (few[0] - PERIODS[0] * each[0], few[1] - PERIODS[0] * each[1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--only", nargs="+", choices=("imports", "ray", "run"), default=("imports", "ray", "run"))
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"load average {load:.1f} on {os.cpu_count()} cores")
    found = {part: Shown() for part in arguments.only}
    if "imports" in found:
        imports(found["imports"])
    if "ray" in found:
        ray_itself(found["ray"])
    if "run" in found:
        with tempfile.TemporaryDirectory(prefix="rayfm-startup-") as folder:
            runs(Path(folder), found["run"])
    if arguments.save:
        save("startup", {"rows_a_period": ROWS, "parts": found}, load)


if __name__ == "__main__":
    main()
