from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rayfm.config import DataError
from rayfm.report import Run, write_report

VOID = {"meta", "link", "br", "img", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; gathers what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def page(finished_run: Path) -> str:
    path = write_report(finished_run)
    assert path == finished_run / "report.html"
    return path.read_text()


def test_is_one_well_formed_file_that_loads_nothing(page: str, finished_run: Path) -> None:
    parsed = Page(page)
    assert parsed.loads == []
    assert not re.search(r"url\((?!#)|@import|<script", page)
    assert parsed.seen.count("svg") == 3 + 3 + 4 + 4 + 1 + 1 + 1 + 2
    sections = [name for name in parsed.ids if re.fullmatch(r"s\d|config", name)]
    assert len(sections) == len(set(sections)) == 9
    assert sorted(path.name for path in finished_run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "progress.jsonl",
        "report.html",
        "summary.json",
    ]


def test_shows_what_the_run_wrote(page: str) -> None:
    assert "big_dcnv2" in page
    assert "111,291 of 112,500" in page
    assert '<td class="worse">98.7</td>' in page
    assert "watch_time: not finite" in page
    assert "embedding_dim: 16" in page
    assert "fm/aux+adapter/click" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().split()


def test_same_run_same_page(page: str, finished_run: Path) -> None:
    assert write_report(finished_run).read_text() == page


def test_an_unfinished_run_says_why_sections_are_empty(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: early\n")
    text = write_report(tmp_path).read_text()
    Page(text)
    for reason in (
        "No test period has been scored yet",
        "No period has been scored yet",
        "No label job has committed",
        "No trainer has finished a period",
        "No period has been prepared",
    ):
        assert reason in text
    assert "<svg" not in text


def test_a_run_without_considerations_or_teacher(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "plain")
    summary = json.loads((run / "summary.json").read_text())
    for part in ("metrics", "differences", "transfer_ratio", "traffic", "calibration_curves"):
        summary[part] = [r for r in summary[part] if r["kind"] == "impression" and r["variant"] != "teacher"]
    (run / "summary.json").write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] == "impression" and line["variant"] != "teacher"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    prepared = {"event": "prepared", "period": "2024-03-01", "rows": {"impression": 5}, "rejected": {}}
    (run / "progress.jsonl").write_text(json.dumps(prepared) + "\n")
    text = write_report(run).read_text()
    Page(text)
    assert "No considerations were scored." in text
    assert "The source has no considerations." in text
    assert "No row was rejected." in text
    assert "The manifests hold no marginals." in text


def test_names_are_escaped_and_no_formulas(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "odd")
    for name in ("summary.json", "metrics.jsonl", "progress.jsonl"):
        path = run / name
        path.write_text(path.read_text().replace('"fm"', r'"<b>f\"$m$</b>"'))
    (run / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    text = write_report(run).read_text()
    Page(text)
    assert "<b>" not in text
    assert "<script" not in text
    assert "$m$" in text


def test_repeated_lines_of_a_resumed_run_count_once(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "resumed")
    once = Run.read(run)
    for name in ("metrics.jsonl", "progress.jsonl"):
        path = run / name
        path.write_text(path.read_text() * 2 + '{"event": "trained", "per')  # and a line cut off by a kill
    again = Run.read(run)
    assert again.metrics == once.metrics
    for kind in ("prepared", "trained"):
        assert again.events(kind, "period", "trainer") == once.events(kind, "period", "trainer")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("summary.json", "{", "summary.json: not valid JSON"),
        ("summary.json", "[]", "expected an object"),
        ("metrics.jsonl", "{}\n{\n{}\n", "metrics.jsonl line 2: not valid JSON"),
        ("progress.jsonl", "3\n", "progress.jsonl line 1: expected an object"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        write_report(tmp_path)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path / "nowhere")


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, rayfm.report; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
