from __future__ import annotations

import pytest

from rayfm.client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerFault,
    Unauthorized,
    Unavailable,
    error_of_status,
)
from rayfm.client.retry import Retries, parse_retry_after


@pytest.mark.parametrize(
    ("failures", "retry_after", "chance", "seconds"),
    [
        (1, None, 0.0, 0.05),
        (2, None, 0.0, 0.1),
        (4, None, 0.0, 0.4),
        (30, None, 0.0, 5.0),
        (1, 2.0, 0.0, 2.0),
        (1, 0.01, 0.0, 0.05),
        (1, 3600.0, 0.0, 5.0),
        (2, None, 0.5, 0.125),
        (1, 2.0, 1.0, 3.0),
    ],
)
def test_waits_double_and_heed_the_service(failures, retry_after, chance, seconds):
    assert Retries().wait(failures, retry_after, chance) == pytest.approx(seconds)


def test_waits_are_spread():
    assert len({Retries().wait(1, None) for _ in range(20)}) > 10


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 3.0), ("0", 0.0), (None, None), ("Fri, 31 Dec 1999 23:59:59 GMT", None), ("-1", None), ("nan", None)],
)
def test_retry_after(text, seconds):
    assert parse_retry_after(text) == seconds


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (400, InvalidRequest, False),
        (401, Unauthorized, False),
        (404, NotFound, False),
        (405, InvalidRequest, False),
        (413, InvalidRequest, False),
        (429, Overloaded, True),
        (500, ServerFault, False),
        (502, Unavailable, True),
        (503, Unavailable, True),
        (504, DeadlineExceeded, False),
        (599, ServerFault, False),
    ],
)
def test_every_status_has_its_error(status, kind, retryable):
    error = error_of_status(status, "why", 2.0)
    assert type(error) is kind
    assert (str(error), error.retryable, error.retry_after) == ("why", retryable, 2.0)
