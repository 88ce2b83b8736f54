"""Where the queue's password comes from."""

from __future__ import annotations

import pytest

from rayfm.serving.nearline.config import REDIS_PASSWORD, NearLineOptions
from rayfm.serving.nearline.doorbell import task_processor


@pytest.mark.parametrize(
    ("url", "password", "broker"),
    [
        ("redis://redis:6379/1", None, "redis://redis:6379/1"),
        ("redis://redis:6379/1", "", "redis://redis:6379/1"),
        ("redis://redis:6379/1", "secret", "redis://:secret@redis:6379/1"),
        ("rediss://ads@redis/1", "p@:/w", "rediss://ads:p%40%3A%2Fw@redis/1"),
        ("redis://:own@redis:6379/1", "secret", "redis://:own@redis:6379/1"),
        ("redis://[::1]:6379/0", "secret", "redis://:secret@[::1]:6379/0"),
    ],
)
def test_the_environments_password_stands_where_the_url_has_none(
    url: str, password: str | None, broker: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(REDIS_PASSWORD, raising=False)
    if password is not None:
        monkeypatch.setenv(REDIS_PASSWORD, password)
    options = NearLineOptions(redis=url)
    assert options.broker == broker
    assert options.redis == url


def test_celery_gets_it(monkeypatch: pytest.MonkeyPatch):
    from rayfm.serving.nearline.config import NearLineConfig

    monkeypatch.setenv(REDIS_PASSWORD, "secret")
    config = NearLineConfig(run="r", teacher="t", root="runs/r", model="t.teacher.0", redis="redis://redis:6379/1")
    assert task_processor(config).adapter_config.broker_url == "redis://:secret@redis:6379/1"
    assert "secret" not in str(config.dump())
