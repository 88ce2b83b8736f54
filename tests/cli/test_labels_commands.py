"""``rayfm labels``: readable at 80 columns, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import yaml
from example_store import write_store
from rich.console import Console

from rayfm.cli import display
from rayfm.cli.main import main
from rayfm.labels import LabelStore, write_lane_file
from rayfm.schema import Task
from rayfm.snapshots import SQLiteMetadataStore

PERIODS = ("2026-01-01", "2026-01-02")
TASKS = (Task(name="click"), Task(name="watch", kind="regression"))
OLD, NEW = "2025-12-30-0123abcd", "2025-12-31-89abcdef"


@pytest.fixture
def rayfm(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """Run the entry point in this process at 80 columns: exit code, stdout, stderr."""
    monkeypatch.setattr(display, "console", Console(width=80))

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["rayfm", "labels", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, rows=[line.split() for line in out.splitlines()])

    return call


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with two versions of labels of a period, in small files, and one of the next."""
    run = tmp_path / "a-run-with-a-rather-long-name"
    examples = write_store(tmp_path / "data", list(PERIODS), impressions=200, considerations=100, lanes=2)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"name": "x", "storage": str(tmp_path / "data")}))
    SQLiteMetadataStore(run / "metadata.sqlite")
    store = LabelStore(run)
    for version, period in ((OLD, PERIODS[0]), (NEW, PERIODS[0]), (NEW, PERIODS[1])):
        for kind in ("impression", "consideration"):
            for lane in range(2):
                if (version, period, kind, lane) == (NEW, PERIODS[1], "impression", 1):
                    continue
                ids = examples.open_lane(period, kind, lane).read(["example_id"])["example_id"].to_numpy()
                labels = pa.table(
                    {
                        "example_id": ids,
                        "click": np.linspace(0.25, 0.75, len(ids)),
                        "watch": pa.array(np.full(len(ids), -2.0), mask=np.arange(len(ids)) % 2 == 0),
                    }
                )
                record = write_lane_file(
                    run, teacher="large_teacher", version=version, trained_through=None, period=period, kind=kind,
                    lane=lane, labels=labels, tasks=TASKS,
                )  # fmt: skip
                store.commit([record])
    return run


def fits(result: SimpleNamespace, title: str) -> bool:
    """Whether the table has no line past 80 columns; the title before it may be a long path."""
    assert result.code == 0, result.err
    body = result.out[result.out.index(title) :]
    return all(len(line) <= 80 for line in body.splitlines())


def test_labels_are_listed_by_teacher_and_period(run_dir, rayfm):
    rows = rayfm("list", run_dir).rows
    assert ["large_teacher", PERIODS[0], OLD, "300"] in rows
    assert ["large_teacher", PERIODS[1], NEW, "200"] in rows
    only = rayfm("list", run_dir, "--period", PERIODS[1], "--teacher", "large_teacher")
    assert PERIODS[0] not in only.out


def test_coverage_by_period_kind_and_traffic(run_dir, rayfm):
    result = rayfm("coverage", run_dir, "--version", NEW)
    assert fits(result, "teacher")
    assert ["large_teacher", NEW, PERIODS[0], "imp.", "feed", "102", "100.0%"] in result.rows, "nothing is folded"
    shares = [row[-1] for row in result.rows if row and row[-1].endswith("%")]
    assert len(shares) == 2 * 2 * 2
    assert shares[:4] == ["100.0%"] * 4
    assert all(30 < float(share[:-1]) < 70 for share in shares[4:6]), "one lane of two"
    half = rayfm("coverage", run_dir, "--version", OLD, "--task", "watch", "--task", "click")
    assert all(30 < float(row[-1][:-1]) < 70 for row in half.rows if row and row[-1].endswith("%"))
    elsewhere = rayfm("coverage", run_dir, "--examples", run_dir.parent / "data", "--version", NEW)
    assert elsewhere.out == result.out


def test_statistics_and_rows_are_shown(run_dir, rayfm):
    result = rayfm("show", run_dir, "large_teacher", NEW, PERIODS[1])
    assert fits(result, "large_teacher@")
    assert ["consideration", "click", "100", "100", "0.5", "0.14725", "0.25", "0.75"] in result.rows
    assert ["consideration", "watch", "100", "50", "-2", "0", "-2", "-2"] in result.rows
    assert ["impression", "click", "100", "100"] in [row[:4] for row in result.rows]
    result = rayfm("show", run_dir, "large_teacher", NEW, PERIODS[1], "--rows", "2")
    assert fits(result, "large_teacher@")
    shown = [row for row in result.rows if row and row[0] in ("impression", "consideration")]
    assert [(row[0], row[1], row[2], row[-1]) for row in shown] == [
        ("consideration", "0", "0", "-"),
        ("consideration", "0", "1", "-2"),
        ("consideration", "1", "0", "-"),
        ("consideration", "1", "1", "-2"),
        ("impression", "0", "0", "-"),
        ("impression", "0", "1", "-2"),
    ]


def test_what_was_shown_is_shown_after_a_compaction(run_dir, rayfm):
    shows = [("show", run_dir, "large_teacher", NEW, PERIODS[0], *rows) for rows in ((), ("--rows", "3"))]
    before = [rayfm(*arguments).out for arguments in shows]
    result = rayfm("compact", run_dir)
    assert fits(result, "teacher")
    assert ["large_teacher", PERIODS[0], "8", "->", "2", "600"] in result.rows
    assert [rayfm(*arguments).out for arguments in shows] == before
    assert rayfm("compact", run_dir).out == "nothing to compact\n"
    assert rayfm("vacuum", run_dir).out == "0 files deleted\n"
    assert rayfm("vacuum", run_dir, "--hours", "0").out == "11 files deleted\n"
    assert [rayfm(*arguments).out for arguments in shows] == before


def test_superseded_versions_expire_but_for_pins(run_dir, rayfm):
    store = LabelStore(run_dir, SQLiteMetadataStore(run_dir / "metadata.sqlite"))
    pin = store.pin("large_teacher", OLD, "students")
    result = rayfm("expire", run_dir, "--keep-versions", "1")
    assert fits(result, "teacher")
    assert ["large_teacher", PERIODS[0], OLD, "pinned:", "students", "300"] in result.rows
    store.release(pin)
    assert "would go" in rayfm("expire", run_dir, "--keep-versions", "1", "--dry-run").out
    assert store.versions("large_teacher") == [OLD, NEW]
    result = rayfm("expire", run_dir, "--keep-versions", "1")
    assert ["large_teacher", PERIODS[0], OLD, "gone", "300"] in result.rows
    assert "rayfm labels vacuum" in result.out
    assert store.versions("large_teacher") == [NEW]
    assert rayfm("expire", run_dir, "--keep-versions", "1").out == "nothing to expire\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("list", "nowhere"), "nowhere is not a run's folder; name one"),
        (("coverage", "{run}", "--task", "clik"), "did you mean 'click'"),
        (("coverage", "{run}", "--examples", "{run}"), "period 2026-01-01 is not in the store"),
        (("show", "{run}", "large_teachr", NEW, PERIODS[0]), "unknown teacher; did you mean 'large_teacher'"),
        (("show", "{run}", "large_teacher", "v9", PERIODS[0]), "it never labelled; its newest versions: 2025-12-30"),
        (("show", "{run}", "large_teacher", OLD, PERIODS[1]), f"for period {PERIODS[1]}; it has labelled {PERIODS[0]}"),
        (("expire", "{run}"), "say what to expire: version, period, before or keep_versions"),
        (("expire", "{run}", "--before", "a/b"), "before 'a/b': use letters"),
        (
            ("expire", "{run}", "--version", OLD, "--metadata", "sqlite:////no.db"),
            "//no.db: no such file; name the meta",
        ),
        (("expire", "{run}", "--version", OLD, "--metadata", "no.db"), "write sqlite:///absolute/path or zookeeper://"),
        (("list", "gs://bucket/x"), "'gs' is no storage"),
        (("coverage", "s3://bucket/x"), "give their folder with --examples"),
        (("vacuum", "s3://bucket/x"), "vacuum needs the metadata store that holds the pins"),
    ],
)
def test_errors_are_one_line(run_dir, rayfm, arguments, complaint):
    result = rayfm(*(str(argument).replace("{run}", str(run_dir)) for argument in arguments))
    assert result.code == 1
    assert complaint in result.err
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("error: ")


def test_help_fits(rayfm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("list", "coverage", "show", "compact", "expire", "vacuum"):
        result = rayfm(command, "--help")
        assert result.code == 0
        assert all(len(line) <= 80 for line in result.out.splitlines())
