"""One real scrape: what a worker and the driver of a Ray record, as Prometheus gets it from the metrics agent."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

from rayfm.operations.metrics import COVERAGE, EXAMPLES, SWAP_SECONDS


def _scrape() -> str:
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode()


def _value(text: str, series: str, **labels: str) -> float | None:
    """The value of the one series of a name that has these labels."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(rf"{series}\{{(.*)\}} (\S+)", line)
        if match and all(f'{name}="{value}"' in match[1] for name, value in labels.items()):
            found.append(float(match[2]))
    assert len(found) <= 1, f"{series} {labels} stands {len(found)} times"
    return found[0] if found else None


@pytest.mark.usefixtures("ray_session")
def test_prometheus_gets_what_a_worker_and_the_driver_record():
    import ray

    def record() -> None:  # in here, so that it travels whole: a worker cannot import this file
        EXAMPLES.add(7, run="scraped", trainer="fm", phase="train")
        EXAMPLES.add(5, run="scraped", trainer="fm", phase="train")

    ray.get(ray.remote(num_cpus=0.1)(record).remote())
    COVERAGE.set(0.875, run="scraped", teacher="fm", kind="impression")
    SWAP_SECONDS.observe(2.0, run="scraped", model="fm.teacher.0")
    deadline = time.monotonic() + 90  # processes report every ten seconds
    while True:
        text = _scrape()
        found = (
            _value(text, EXAMPLES.exported, run="scraped", trainer="fm", phase="train"),
            _value(text, COVERAGE.exported, run="scraped", teacher="fm", kind="impression"),
            _value(text, f"{SWAP_SECONDS.exported}_bucket", run="scraped", model="fm.teacher.0", le="3.0"),
            _value(text, f"{SWAP_SECONDS.exported}_bucket", run="scraped", model="fm.teacher.0", le="1.0"),
            _value(text, f"{SWAP_SECONDS.exported}_sum", run="scraped", model="fm.teacher.0"),
        )
        if None not in found or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert found == (12, 0.875, 1, 0, 2.0)
    assert f"# TYPE {EXAMPLES.exported} counter" in text
    assert f"# TYPE {COVERAGE.exported} gauge" in text
