"""Near-line labelling: a published teacher, once a file, and a folder of each test's own that has it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nearline_cases import V1, publish_teacher

    root = tmp_path_factory.mktemp("published")
    publish_teacher(root, V1)
    return root


@pytest.fixture
def root(tmp_path: Path, published: Path) -> Path:
    (tmp_path / "snapshots").symlink_to(published / "snapshots")
    return tmp_path
