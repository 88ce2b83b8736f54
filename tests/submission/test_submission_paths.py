"""Paths of a config that mean something else on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_pipeline import small_pipeline

from rayfm.config import ConfigError
from rayfm.submission.package import collect
from rayfm.submission.paths import check_paths


def found(folder: Path, **changes: Any) -> list[str]:
    absolute = {"storage": "/mnt/none/data", "runs": "/mnt/none/runs"}
    return check_paths(small_pipeline(folder, **absolute | changes), collect(folder))


def test_what_is_here_and_not_sent_is_told(tmp_path: Path) -> None:
    assert found(tmp_path, runs=str(tmp_path)) == [f"runs={tmp_path}", f"data.source.path={tmp_path / 'log'}"]


def test_what_is_only_there_is_not(tmp_path: Path) -> None:
    assert found(tmp_path, data={"source": {"path": "/mnt/none/log"}}) == []


@pytest.mark.parametrize("key", ["storage", "runs"])
def test_a_relative_folder_would_go_with_the_job(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: 'out/{key}' is relative.*--set {key}=/mnt/shared/{key}"):
        found(tmp_path, **{key: f"out/{key}"})


def test_small_logs_may_go_with_the_package(tmp_path: Path) -> None:
    assert found(tmp_path, data={"source": {"path": "log"}}) == []


def test_logs_that_are_left_out_are_refused(tmp_path: Path) -> None:
    small_pipeline(tmp_path)
    (tmp_path / ".gitignore").write_text("/log\n")
    with pytest.raises(ConfigError, match=r"data\.source\.path: log is left out of the package.*--set data\.source"):
        found(tmp_path, data={"source": {"path": "log"}})
