"""``rayfm list models``: sizes of the registered models and of a pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from called import caller
from pydantic import Field
from rich.console import Console
from small_pipeline import small_pipeline, write_config

from rayfm.cli import display, sizes
from rayfm.models.base import MODELS, ModelConfig
from rayfm.models.size import REFERENCE_SCHEMA, model_size, reference_config


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "console", Console(width=80))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``rayfm list``: exit code, stdout, stderr."""
    return caller("list", monkeypatch, capsys)


@pytest.fixture
def few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the models, and one that the reference schema cannot build."""

    class Needy:
        """It needs a key."""

        class Config(ModelConfig):
            type: str = "needy"
            anchor: str = Field(min_length=1)

    parts: dict[str, Any] = {name: MODELS[name] for name in ("dlrm", "two_tower")}
    monkeypatch.setattr(MODELS, "_parts", {**parts, "needy": Needy})


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (41_600_000, "41.6M"), (999_999, "1M"), (2 * 10**12, "2T")],
)
def test_numbers_have_three_digits(number: int, text: str) -> None:
    assert sizes.short(number) == text


@pytest.mark.usefixtures("few_models")
def test_models_with_their_sizes(listed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = listed("models")
    lines = out.splitlines()
    assert code == 0
    assert all(len(line) <= 80 for line in lines)
    cells = {line.split()[0]: line.split()[1:4] for line in lines if line.split()}
    counted = model_size(reference_config("dlrm"), REFERENCE_SCHEMA, ("click",))
    assert cells["type"] == ["tables", "dense", "FLOPs"]
    assert cells["dlrm"] == ["41.6M", sizes.short(counted.dense_parameters), sizes.short(counted.flops)]
    assert cells["two_tower"][0] == "41.6M"
    assert cells["needy"] == ["-", "-", "-"]
    said = " ".join(out.split())
    assert "13 dense features, 26 ids with a table of 100,000 rows each, a history of 50 items" in said
    assert "needs keys that have no default" in said


def test_a_pipelines_own_models(tmp_path: Path, listed: Callable[..., tuple[int, str, str]]) -> None:
    path = write_config(tmp_path)
    _, once, _ = listed("models", "--config", path)
    code, out, _ = listed("--config", path, "--set", "teachers.fm.model.scale=2")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    small, large = ({line.split()[0]: line.split()[1:] for line in text.splitlines() if line} for text in (once, out))
    assert small["vm"] == large["vm"]
    assert large["fm"][3:] == ["2", "dcnv2", "teacher"]
    config = small_pipeline(tmp_path)
    rows = sum(table.rows for table in config.schema_.tables.values())
    assert small["fm"][0] == sizes.short(rows * 8)
    assert large["fm"][0] == sizes.short(rows * 16)
    assert large["fm"][1] != small["fm"][1]


def test_config_is_for_models_alone(tmp_path: Path, listed: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = listed("sources", "--config", write_config(tmp_path))
    assert (code, err) == (1, "error: --config counts a pipeline's models; leave out 'sources'\n")
