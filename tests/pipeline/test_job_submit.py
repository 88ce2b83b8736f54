"""``ray job submit`` of the main job: what is refused. A job that runs to its end is in `test_run`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import Head, running_head, write_token
from small_pipeline import write_config


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("token")) as running:
        yield running


@pytest.mark.timeout(300)
def test_a_wrong_config_is_a_failed_job_of_one_line(head: Head, tmp_path: Path) -> None:
    config = write_config(tmp_path, shedule={})
    result = head.submit(str(config))
    assert result.returncode == 1
    output = result.stdout + result.stderr
    errors = {line for line in output.splitlines() if line.startswith("error:")}
    assert errors == {f"error: {config}: unknown key 'shedule'; did you mean 'schedule'?"}
    assert "Traceback" not in output


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "refusal"), [("token", "Invalid authentication"), ("disabled", "Missing authentication")]
)
def test_without_the_right_token_nothing_is_submitted(head: Head, tmp_path: Path, mode: str, refusal: str) -> None:
    token = write_token(tmp_path / "token")
    result = head.submit(str(write_config(tmp_path)), RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_MODE=mode)
    assert result.returncode != 0
    assert refusal in result.stdout + result.stderr
    assert not (tmp_path / "runs").exists()
