"""The Dockerfile: linted, and its versions those of the Makefile, pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE))


def constraints() -> dict[str, str]:
    lines = (ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    found = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in found.values())
    return found


def test_hadolint_finds_nothing():
    said = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), "--no-color", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.stdout + said.stderr, said.returncode) == ("", 0)


def test_stages_user_and_pinned_base():
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM ${PYTHON_IMAGE} AS build",
        "FROM ${PYTHON_IMAGE}",
    ]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", arguments()["PYTHON_IMAGE"])
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000:1000"]
    # Nothing is made as root after it.
    assert lines.index("USER 1000:1000") > max(n for n, line in enumerate(lines) if line.startswith("COPY"))


def test_torch_torchrec_and_fbgemm_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text()
    given = arguments()
    assert given["TORCH"] == re.search(r"^TORCH := (\S+)$", makefile, re.MULTILINE).group(1)
    assert given["TORCHREC"] == re.search(r"^TORCHREC := (\S+)$", makefile, re.MULTILINE).group(1)
    assert given["FBGEMM"] == re.search(r"^FBGEMM := .*==(\S+)$", makefile, re.MULTILINE).group(1)
    assert given["TORCH_CPU_INDEX"] in makefile


def test_constraints_pin_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE.read_text())
    assert extras.split(",") == sorted(extras.split(","))
    asked = [
        *project["dependencies"],
        *(one for name in extras.split(",") for one in project["optional-dependencies"][name]),
    ]
    pinned, given = constraints(), arguments()
    for text in asked:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        version = given["TORCH"] if name == "torch" else pinned.get(name)
        assert version is not None, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(version), f"{text}: constraints.txt has {version}"
    assert list(pinned) == sorted(pinned)
    assert not pinned.keys() & {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "rayfm"}


def test_the_context_has_all_that_is_copied_and_nothing_else():
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
        for word in line.split()
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in copied)
    assert "*" in ignored
