"""The long soak: ``python tests/soak/soak_main.py --faults 200 --seed 1 --result docs/soak``.

It starts a Ray, a ZooKeeper and a Redis of its own, and ends them. The result file is named by the day.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
# Workers import what they are handed by module name.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # clients and label jobs run beside Ray's workers, not above them
os.environ.pop("RAY_ADDRESS", None)


def main() -> int:
    """Run the soak and write its result; 1 where a promise was broken."""
    import ray
    from conftest import RAY
    from soak_faults import KINDS
    from soak_run import Plan, soak

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean-s", type=float, default=5.0, help="seconds between faults on average")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed")
    parser.add_argument("--rows", type=int, default=20_000, help="impressions of each period that is labelled")
    parser.add_argument("--result", type=Path, help="folder for soak-DATE.json")
    options = parser.parse_args()
    plan = Plan(
        seed=options.seed,
        faults=options.faults,
        mean_s=options.mean_s,
        kinds=tuple(options.kinds),
        swaps=options.swaps,
        publish_s=20.0,
        pause_s=0.03,
        impressions=options.rows,
        considerations=options.rows // 2,
    )
    ray.init(**RAY)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=TESTS, capture_output=True, text=True, check=False
    ).stdout.strip()
    folder = Path(tempfile.mkdtemp(prefix="rayfm-soak-"))
    try:
        result = soak(folder, plan, lambda *words: print(*words, flush=True))
    except AssertionError as error:
        print(f"a promise was broken (seed {plan.seed}; {folder} is left to look at): {error}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    shutil.rmtree(folder)
    result = {
        "date": today,
        "commit": commit,
        "seed": plan.seed,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__},
        **result,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.result is not None:
        options.result.mkdir(parents=True, exist_ok=True)
        (options.result / f"soak-{today}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
