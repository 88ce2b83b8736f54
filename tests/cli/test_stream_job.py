from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_pipeline import write_config

from rayfm.config import LabelError

JOB = Path(__file__).resolve().parents[2] / "jobs" / "stream.py"


@pytest.fixture
def job():
    spec = importlib.util.spec_from_file_location("stream_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_config_it_says_how_it_is_called(job, capsys):
    assert job.main([]) == 2
    assert "python jobs/stream.py CONFIG" in capsys.readouterr().err


def test_a_wrong_config_is_one_line_and_a_failed_job(job, tmp_path, capsys):
    path = write_config(tmp_path, shedule={})
    assert job.main([str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: unknown key 'shedule'; did you mean 'schedule'?\n"


def test_it_joins_the_cluster_resumes_and_reports(job, tmp_path, capsys, monkeypatch):
    asked = {}

    def run(config, resume, watch, follow=False):
        asked.update(follow=follow, address=config.ray.address, seeds=config.seeds, resume=resume)
        pipeline = SimpleNamespace(periods=("a", "b"))
        for done in (0.0, 0.4, 1.0, 1.7, 2.0):
            watch(SimpleNamespace(pipeline=pipeline, trained={"students": (done, "train")}))
        return SimpleNamespace(seconds=12.3, report=tmp_path / "report.html")

    monkeypatch.setattr(job, "run", run)
    assert job.main([str(write_config(tmp_path)), "seeds=[3]"]) == 0
    assert asked == {"address": "auto", "seeds": (3,), "resume": True, "follow": False}
    assert capsys.readouterr().out.splitlines() == [
        "students: 1 of 2 periods",
        "students: 2 of 2 periods",
        f"finished in 12 s: {tmp_path / 'report.html'}",
    ]


def test_a_failed_run_is_a_failed_job(job, tmp_path, capsys, monkeypatch):
    def run(config, resume, watch):
        raise LabelError("no labels; run `rayfm label`")

    monkeypatch.setattr(job, "run", run)
    assert job.main([str(write_config(tmp_path))]) == 1
    assert capsys.readouterr().err == "error: no labels; run `rayfm label`\n"


def test_it_follows_where_it_is_told_to(job, tmp_path, monkeypatch):
    def run(config, resume, watch, follow=False):
        assert follow
        return SimpleNamespace(seconds=12.3, report=tmp_path / "report.html")

    monkeypatch.setattr(job, "run", run)
    assert job.main([str(write_config(tmp_path)), "--follow", "seeds=[3]"]) == 0
