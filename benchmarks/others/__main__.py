"""``python -m benchmarks.others --work FOLDER``: rayfm beside FuxiCTR and a plain TorchRec loop (docs/speed.md).

Data, stores and what was measured stay in FOLDER, and what stands there is not measured again, so that a long
comparison can be made in pieces. FuxiCTR has a Python of its own (``--fuxictr-python``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.others.cases import DATA, MODELS, RATES, ROOT, Case, describe, open_case
from benchmarks.others.table import FUXICTR_BAR, HEADER, PLAIN_BAR, Row, fuxictr_rows, plain_rows
from benchmarks.others.watch import watch
from benchmarks.saved import save

FUXICTR = "2.3.10"
PRECISIONS = ("fp32", "bf16")
# Without aiohttp two threads of its Ray that look at several files trip over one another in fsspec's import of it.
INSTALL = (
    "FuxiCTR is not measured: give --fuxictr-python PYTHON, one with "
    f"'pip install fuxictr=={FUXICTR} aiohttp torch==2.13.0' (a virtual environment of its own; the CPU build of torch)"
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def missing_fuxictr(python: str | None) -> str | None:
    """Why FuxiCTR cannot be measured; None where it can."""
    if python is None:
        return INSTALL
    program = "import fuxictr; print(fuxictr.__version__)"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{INSTALL}; {python}: {error.strerror}"
    if done.returncode:
        return f"{INSTALL}; {python}: {(done.stderr.splitlines() or ['it failed'])[-1]}"
    found = done.stdout.strip()
    return None if found == FUXICTR else f"{INSTALL}; {python} has {found}"


class Bench:
    """What was measured of one case, kept in its folder."""

    def __init__(self, case: Case, work: Path, python: str | None) -> None:
        self.case, self.work, self.python = case, work, python
        self._file = case.folder / "measured.json"
        self.measured: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def measure(self, side: str, models: list[str], seeds: list[int], precisions: Sequence[str] = PRECISIONS) -> None:
        """Run a side's programs that were not run yet."""
        if side == "fuxictr":
            assert self.python is not None
            command = [self.python, "-m", "benchmarks.others.fuxictr_side"]
            self._prepare("fuxictr", "fuxictr", [*command, "prepare", describe(self.case, models[0])])
            for model in models:
                for seed in seeds:
                    arguments = ["train", describe(self.case, model), str(seed), str(self.case.rates(model).fuxictr)]
                    self._run(f"fuxictr/train/{model}/{seed}", [*command, *arguments])
            return
        command = [sys.executable, "-m", "benchmarks.others.ours"]
        place = [self.case.name, str(self.work)]
        self._prepare("ours", "store", [*command, "prepare", *place])
        part, start = ("train", "ours/train") if side == "ours" else ("plain", "plain")
        for model in models:
            for seed in seeds:
                for precision in precisions:
                    key = f"{start}/{model}/{precision}/{seed}"
                    self._run(key, [*command, part, *place, model, precision, str(seed)])

    def _prepare(self, side: str, folder: str, command: list[str]) -> None:
        """What stands without a figure, because it was broken off, goes first: finding it there would cost nothing."""
        key = f"{side}/prepare"
        if key not in self.measured:
            shutil.rmtree(self.case.folder / folder, ignore_errors=True)
        self._run(key, command)

    def _run(self, key: str, command: list[str]) -> None:
        if key in self.measured:
            return
        print(f"{self.case.name}: {key} ...", file=sys.stderr, flush=True)
        log = self.case.folder / f"{key.replace('/', '-')}.log"
        phases, result = watch(command, ROOT, log, ENVIRONMENT)
        self.measured[key] = {
            "phases": {name: dataclasses.asdict(phase) for name, phase in phases.items()},
            "result": result,
        }
        self._file.write_text(json.dumps(self.measured, indent=1) + "\n")

    def rows(self) -> list[Row]:
        """The table's rows."""
        rows = []
        for model in MODELS:
            for precision in PRECISIONS:
                rows += fuxictr_rows(self.case.name, model, precision, self.measured)
                rows += plain_rows(self.case.name, model, precision, self.measured)
        return rows


def short(row: Row) -> bool:
    """Whether a row misses its bar: of training against the plain loop, of everything against FuxiCTR."""
    if row.against == "TorchRec":
        return row.ratio < PLAIN_BAR
    if row.part == "train":
        return row.ratio < FUXICTR_BAR or row.auc < row.other_auc
    return row.part == "both" and row.ratio < FUXICTR_BAR


def keep(rows: list[Row], benches: list[Bench], load: float) -> None:
    """Keep everything that was measured in a dated file."""
    content = {
        "fuxictr": FUXICTR,
        "learning_rates": {f"{data}/{model}": dataclasses.asdict(rates) for (data, model), rates in RATES.items()},
        "rows": [{k: v for k, v in dataclasses.asdict(row).items() if v == v} for row in rows],
        "measured": {bench.case.name: bench.measured for bench in benches},
    }
    save("others", content, load)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.others", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", required=True, type=Path, help="folder for data, stores and what was measured")
    parser.add_argument("--data", nargs="+", choices=DATA, default=["criteo-1m"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--against", nargs="+", choices=("fuxictr", "torchrec"), default=["fuxictr", "torchrec"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--fuxictr-python", metavar="PYTHON", help="a Python that has FuxiCTR")
    parser.add_argument("--kuairand", type=Path, metavar="FOLDER", help="KuaiRand-Pure's official files")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    load = os.getloadavg()[0]
    absent = missing_fuxictr(arguments.fuxictr_python) if "fuxictr" in arguments.against else None
    benches, rows = [], []
    for data in arguments.data:
        case = open_case(data, arguments.work.absolute(), arguments.kuairand)
        bench = Bench(case, arguments.work.absolute(), arguments.fuxictr_python)
        if "fuxictr" in arguments.against:
            bench.measure("ours", arguments.models, arguments.seeds, arguments.precisions)
            if absent is None:
                bench.measure("fuxictr", arguments.models, arguments.seeds)
        if "torchrec" in arguments.against:
            bench.measure("plain", arguments.models, arguments.seeds[:1], arguments.precisions)
        benches.append(bench)
        rows += bench.rows()
    print("examples a CPU-second; AUC on the newest tenth of the rows, which is held out")
    print(HEADER)
    for row in rows:
        print(row.text())
    if absent is not None:
        print(absent)
    if arguments.save:
        keep(rows, benches, load)
    return 1 if absent is not None or any(short(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
