"""The wheel and the sdist: what is in them, what they say of themselves, and that the wheel runs once installed."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import rayfm

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md")
FOLDERS = ("rayfm", "tests", "docs")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, as `make dist` makes them, from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("dist")
    (folder / "tree").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder / "tree" / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in packaged} == {"rayfm"}
    tree = wheel.parent.parent / "tree"
    written = {str(path.relative_to(tree)) for path in (tree / "rayfm").rglob("*.py*")}
    assert written <= packaged, "not in the wheel: a folder without __init__.py?"
    rest = {Path(name).suffix for name in packaged - written}
    assert rest <= {".html", ".proto", ".pyi", ".typed", ".json", ".yaml"}
    assert {"rayfm/py.typed", "rayfm/report/page.html", "rayfm/client/proto/scoring.proto"} <= packaged
    assert not [name for name in names if "test" in Path(name).name or name.endswith((".parquet", ".csv"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_what_the_wheel_says_of_itself(metadata: Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"], "the version stands in rayfm/__init__.py alone"
    assert metadata["Version"] == rayfm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or ()) == project["optional-dependencies"].keys()
    assert "ray[data,default,serve,train]==2.60.0" in (metadata.get_all("Requires-Dist") or ())


def test_the_sdist_can_be_built_and_holds_no_tests(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")  # the wheel was built from it
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "rayfm/py.typed"} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"rayfm", "rayfm.egg-info"}


def test_it_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own; what rayfm needs is taken from this one, without its own (editable) rayfm."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # A .pth file adds the folder to the path and does not read the .pth files in it.
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def output(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = output(str(python), "-c", "import rayfm; print(rayfm.__file__, rayfm.__version__)")
    assert where.split() == [str(site / "rayfm" / "__init__.py"), rayfm.__version__]
    assert "distil" in output(str(folder / "bin" / "rayfm"), "--help")


def test_versions_that_must_match_are_the_same_everywhere() -> None:
    """pyproject.toml, the Makefile, and the table and commands of docs/installation.md."""
    makefile, page = (ROOT / "Makefile").read_text(), (ROOT / "docs" / "installation.md").read_text()
    torch, torchrec = (re.search(rf"^{name} := (\S+)", makefile, re.MULTILINE) for name in ("TORCH", "TORCHREC"))
    fbgemm = re.search(r"fbgemm-gpu-cpu\)==(\S+)", makefile)
    assert torch is not None
    assert torchrec is not None
    assert fbgemm is not None
    dependencies = "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert f"torch=={torch.group(1)}" in dependencies
    ray = re.search(r"^ray\[.*\]==(\S+)", dependencies, re.MULTILINE)
    assert ray is not None
    for row in (
        f"| torch | {torch.group(1)} |",
        f"| torchrec | {torchrec.group(1)} |",
        f"| fbgemm-gpu-cpu or fbgemm-gpu | {fbgemm.group(1)} |",
        f"| ray | {ray.group(1)} |",
    ):
        assert row in page
    assert set(re.findall(r"\btorch==([\d.]+\d)", page)) == {torch.group(1)}
    assert set(re.findall(r"torchrec==([\d.]+\d)", page)) == {torchrec.group(1)}
    assert set(re.findall(r"fbgemm-gpu(?:-cpu)?==([\d.]+\d)", page)) == {fbgemm.group(1)}


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert rayfm.__version__ in headings[:2], "a release has its heading; what comes next stands under Unreleased"
