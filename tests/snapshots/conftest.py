"""Both metadata stores: what is tested with ``url`` or ``metadata`` runs on SQLite and on a real ZooKeeper."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import pytest

from rayfm.snapshots.metadata import MetadataStore, open_metadata


@pytest.fixture(params=["sqlite", "zookeeper"])
def url(request, tmp_path) -> str:
    """Of an empty store."""
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/meta.db"
    return f"zookeeper://{request.getfixturevalue('zookeeper_server').address}/test/{uuid.uuid4().hex}"


@pytest.fixture
def metadata(url) -> Iterator[MetadataStore]:
    with contextlib.closing(open_metadata(url)) as opened:
        yield opened
