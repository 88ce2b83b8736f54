"""``python -m benchmarks.run`` (``make bench``): every line's ratio against its bar; exit 1 where one falls short.

Each line runs in a process of its own with one intra-op thread. ``--only`` takes lines whose name begins so; ``--save``
keeps the figures with date, command and machine under ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table: a module's main with arguments, and the bar that its ratio is held to."""

    name: str
    module: str
    arguments: tuple[str, ...]
    bar: float
    at_most: bool = False
    """The ratio is of times: it should stay below the bar."""

    def holds(self, ratio: float) -> bool:
        return ratio <= self.bar if self.at_most else ratio >= self.bar


OBJECTIVES = (
    "auxiliary_head",
    "auxiliary_task",
    "cross_stage",
    "dependent_task",
    "direct",
    "kl",
    "listwise",
    "pairwise",
    "representation",
    "selected_label",
    "self_auxiliary",
    "student_adapter",
)
"""Every objective, each measured alone; a test compares the list with the registry, which takes seconds to import."""

FORMS = ("eager", "torchscript", "int8", "aot_bf16")
"""What a student is served as, each against the exported module as it is."""

CASES = [(model, precision) for model in ("dlrm", "dcnv2") for precision in ("fp32", "bf16")]
OTHERS = [(model, precision) for model in ("dcnv2", "deepfm") for precision in ("fp32", "bf16")]
LINES = [
    Line("reader/direct", "reader", ("direct",), 0.7),
    Line("reader/ray_data", "reader", ("ray_data",), 0.3),
    *(Line(f"training/{m}/{p}", "training", (m, p), 0.95) for m, p in CASES),
    # The table's kernels that a worker takes on this processor, against fbgemm's own; the forward is in both.
    *(Line(f"kernels/{what}", "kernels", (what,), 0.95) for what in ("bags", "sequences")),
    *(Line(f"objectives/{m}/{p}", "objectives", (m, p), 1.10, at_most=True) for m, p in CASES),
    # Alone they are measured where a step is shortest.
    *(Line(f"objectives/{kind}", "objectives", ("dlrm", "bf16", kind), 1.10, at_most=True) for kind in OBJECTIVES),
    *(Line(f"labelling/{m}", "labelling", (m,), 0.85) for m in ("dlrm", "dcnv2")),
    *(Line(f"endpoint/{m}", "endpoint", (m,), 0.8) for m in ("dlrm", "dcnv2")),
    *(Line(f"endpoint/{m}/haproxy", "endpoint", (m, "haproxy"), 0.8) for m in ("dlrm", "dcnv2")),
    *(Line(f"serving/{m}/{form}", "serving", (m, form), 1.0) for m in ("dlrm", "dcnv2") for form in FORMS),
    # Against others, in examples a CPU-second; FuxiCTR where $FUXICTR_PYTHON has it (docs/speed.md).
    *(Line(f"others/torchrec/{m}/{p}", "others.line", ("torchrec", m, p), 0.95) for m, p in OTHERS),
    *(Line(f"others/fuxictr/{m}/{p}", "others.line", ("fuxictr", m, p), 3.0) for m, p in OTHERS),
    # How far `rayfm plan`'s step is from the measured one, either way.
    *(Line(f"plan/{m}", "plan", (m,), 2.0, at_most=True) for m in ("dlrm", "dcnv2", "deepfm")),
    # Peak memory of a process at 20 million rows over one at a million.
    *(
        Line(f"memory/{what}", "memory", (what,), 1.10, at_most=True)
        for what in ("training", "predicting", "preparing")
    ),
]


def measure(line: Line, store: str) -> dict[str, Any]:
    """Run one line; its outcome, or ``error``."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", f"benchmarks.{line.module}", store, *line.arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.strip()]
        return {"error": said[-1] if said else f"exit code {done.returncode}"}
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def row(line: Line, outcome: dict[str, Any]) -> str:
    """The line's row, at most 80 columns."""
    bar = f"{'<=' if line.at_most else '>='}{line.bar:.2f}"
    if "error" in outcome:
        return f"{line.name:<26} {outcome['error']}"[:80]
    verdict = "ok" if line.holds(outcome["ratio"]) else "short"
    return f"{line.name:<26} {outcome['ratio']:5.2f} {bar:>7} {verdict:<6}{outcome['cpu']:5.2f}  {outcome['ours']:>18}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", help="lines whose names begin so, e.g. reader training/dlrm"
    )
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    arguments = parser.parse_args()
    lines = [line for line in LINES if line.name.startswith(tuple(arguments.only or [""]))]
    if not lines:
        parser.error(
            f"no line is called {' or '.join(arguments.only)}; there are {', '.join(line.name for line in LINES)}"
        )
    load = os.getloadavg()[0]
    started = time.perf_counter()
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="rayfm-bench-") as store:
        from benchmarks.data import write_store

        print("writing the examples ...", file=sys.stderr)
        write_store(Path(store))
        print(f"{'':<26} {'ratio':>5} {'bar':>7} {'':<6}{'cpu':>5}  {'rayfm':>18}")
        for line in lines:
            outcomes[line.name] = measure(line, store)
            print(row(line, outcomes[line.name]), flush=True)
    print(f"{time.perf_counter() - started:.0f} s; load average at the start {load:.1f} on {os.cpu_count()} cores")
    if arguments.save:
        save(outcomes, load)
    short = [line for line in lines if not line.holds(outcomes[line.name].get("ratio", float("nan")))]
    return 1 if short else 0


def save(outcomes: dict[str, dict[str, Any]], load: float) -> None:
    """Keep the figures in a dated file."""
    from benchmarks import saved
    from benchmarks.data import describe

    lines = {
        line.name: {**outcomes[line.name], "bar": line.bar, "at_most": line.at_most}
        for line in LINES
        if line.name in outcomes
    }
    saved.save("run", {"case": describe(), "lines": lines}, load)


if __name__ == "__main__":
    sys.exit(main())
