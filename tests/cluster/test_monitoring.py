"""Dashboard and alert rules name metrics that are exported, and every alert is explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray
import yaml

from rayfm.operations.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster" / "kubernetes" / "components" / "monitoring"
OURS = {metric.exported: metric for metric in METRICS}
OF_THE_TARGET = {"job", "namespace", "pod", "part", "group", "ray_cluster"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return found


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    """PromQL of all panels and rules."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield re.sub(r'"\$\w+"', '".*"', target["expr"])
    for rule in alerts():
        yield rule["expr"]


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels that are matched) of an expression."""
    for name, matchers in re.findall(r"\b((?:ray_|up\b)\w*)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def test_every_expression_is_promql():
    found = list(expressions())
    assert len(found) > 35
    for expression in found:
        promql_parser.parse(expression)


def test_every_metric_is_exported_with_the_labels_that_are_used():
    seen = set()
    serve = _serves_metrics()
    for expression in expressions():
        grouped = {label for part in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in part.split(", ")}
        names = [name for name, _ in selectors(expression)]
        assert names, expression
        for name, labels in selectors(expression):
            if name.startswith("ray_rayfm_"):
                metric = OURS.get(name) or OURS[re.sub(r"_(bucket|sum|count)$", "", name)]
                assert (metric.kind == "histogram") == (metric.exported != name), name
                seen.add(metric.exported)
                own = {*metric.labels, "le"} if metric.kind == "histogram" else set(metric.labels)
                assert labels <= own, f"{name}: {labels - own}"
                if len({one for one in names if one.startswith("ray_rayfm_")}) == len(names):
                    assert grouped <= own, f"{expression}: {grouped - own}"
                if metric.kind == "counter":
                    assert re.search(rf"(rate|increase)\({name}\b", expression), f"{expression}: a counter starts anew"
            elif name.startswith("ray_serve_"):
                assert re.sub(r"_(total|bucket)$", "", name.removeprefix("ray_")) in serve, name
            else:
                assert name == "up"
                assert labels <= OF_THE_TARGET
    unseen = OURS.keys() - seen
    assert not unseen, f"the dashboard shows nothing of {sorted(unseen)}"


def _serves_metrics() -> set[str]:
    folder = Path(ray.__file__).parent / "serve" / "_private"
    return {name for path in folder.glob("*.py") for name in re.findall(r'"(serve_[a-z_]+)"', path.read_text())}


def test_alerts_fire_when_they_should(tmp_path: Path):
    """Prometheus' own check of the rules, of the scrape config, and its unit tests of what fires when."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on the path (Debian: prometheus)")
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_fire.yaml"), tmp_path)
    scrape = yaml.safe_load((MONITORING / "scrape.yaml").read_text())
    for job in scrape["scrape_configs"]:
        del job["kubernetes_sd_configs"]  # Debian's promtool is built without
        job["static_configs"] = [{"targets": ["pod:8080"]}]
    (tmp_path / "scrape.yaml").write_text(yaml.safe_dump(scrape))
    for command in (
        ["check", "rules", "alerts.yaml"],
        ["check", "config", "--syntax-only", "scrape.yaml"],
        ["test", "rules", "alerts_fire.yaml"],
    ):
        said = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr


def test_every_alert_is_explained():
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    part = re.search(r"^## Alerts\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert part
    explained = re.findall(r"^\| `(Rayfm\w+)` \|", part.group(1), re.MULTILINE)
    names = [rule["alert"] for rule in alerts()]
    assert explained == names
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = {label for one in re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"]) for label in one.split(", ")}
        assert labels <= (grouped or OF_THE_TARGET), rule["alert"]


def test_every_kind_of_the_pipelines_own_alerts_has_a_rule():
    (alert,) = [metric for metric in METRICS if metric.name == "rayfm_alert"]
    known = set(re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", alert.help.partition("alert is ")[2].partition(", subject")[0]))
    known -= {"or"}
    ruled = {kind for rule in alerts() for kind in re.findall(r'rayfm_alert\{alert="(\w+)"\}', rule["expr"])}
    assert ruled == known


def test_panels_do_not_lie_on_one_another():
    taken = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_targets_have_the_labels_that_alerts_name():
    scrape = yaml.safe_load((MONITORING / "scrape.yaml").read_text())
    jobs = {job["job_name"]: job for job in scrape["scrape_configs"]}
    assert all(name.startswith("rayfm-") for name in jobs)
    ray_labels = {rule.get("target_label") for rule in jobs["rayfm-ray"]["relabel_configs"]} - {None}
    assert ray_labels == OF_THE_TARGET - {"job"}
