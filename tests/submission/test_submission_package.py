"""What of a folder goes to the cluster."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

import rayfm
from rayfm.config import ConfigError
from rayfm.submission.package import Package, collect


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def sent(package: Package) -> list[str]:
    """Names, without those of rayfm itself."""
    return [name for name in package.files if not name.startswith("rayfm/")]


def test_what_is_no_part_of_the_program_stays_here(tmp_path: Path) -> None:
    folder = tree(
        tmp_path, "c.yaml", "src/model.py", "src/data/reader.py", "src/runs/x.py",
        "runs/demo/model", "data/log.parquet", ".venv/bin/python", "src/__pycache__/model.pyc", ".git/HEAD",
        "sub/.git", ".mypy_cache/x", "node_modules/x",
    )  # fmt: skip
    assert sent(collect(folder)) == ["c.yaml", "src/data/reader.py", "src/model.py", "src/runs/x.py"]


def test_ignore_files_count_below_their_folder(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a.log", "keep.log", "b/c.bin", "b/d.py", "e/c.bin", "big/x/y", "out/x")
    (folder / ".gitignore").write_text("*.log\n!keep.log\n# nothing\nout/\n")
    (folder / "b" / ".gitignore").write_text("*.bin\n")
    (folder / ".rayignore").write_text("/big\n")
    assert sent(collect(folder)) == [".gitignore", ".rayignore", "b/.gitignore", "b/d.py", "e/c.bin", "keep.log"]


def test_gitignore_may_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    folder = tree(tmp_path, "a.log", "b.bin")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / ".rayignore").write_text("*.bin\n")
    assert sent(collect(folder)) == [".gitignore", ".rayignore", "a.log"]


def test_ignore_files_above_count_within_a_repository(tmp_path: Path) -> None:
    folder = tree(tmp_path, "repository/.git/HEAD", "repository/part/a.log", "repository/part/b.py", "repository/out/c")
    (folder / ".gitignore").write_text("*.py\n")  # of another repository, or of none
    (folder / "repository" / ".gitignore").write_text("*.log\n/out/\n")
    assert sent(collect(folder / "repository" / "part")) == ["b.py"]
    assert sent(collect(folder / "repository" / "out")) == ["c"], "an ignored folder that is named is meant"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder = tree(tmp_path / "work", "a.py")
    tree(tmp_path / "library", "lib.py")
    (folder / "library").symlink_to(tmp_path / "library")
    (folder / "circle").symlink_to(folder)
    (tmp_path / "library" / "back").symlink_to(tmp_path / "library")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    assert sent(collect(folder)) == ["a.py", "library/lib.py"]


def test_what_a_run_writes_stays_here(tmp_path: Path) -> None:
    folder = tree(tmp_path, "c.yaml", "output/store/x", "output/notes.txt")
    assert sent(collect(folder, [folder / "output" / "store"])) == ["c.yaml", "output/notes.txt"]


def test_rayfm_goes_with_a_project_that_has_none_of_its_own(tmp_path: Path) -> None:
    package = collect(tree(tmp_path / "project", "c.yaml"))
    assert package.own
    assert package.files["rayfm/__init__.py"] == Path(rayfm.__file__)
    assert "rayfm/data/prepare.py" in package.files, "a room of that name is not the data of a run"
    assert not any("__pycache__" in name for name in package.files)
    clone = collect(tree(tmp_path / "clone", "rayfm/__init__.py", "c.yaml"))
    assert not clone.own
    assert list(clone.files) == ["c.yaml", "rayfm/__init__.py"]


def test_secrets_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(tmp_path, "c.yaml", ".env", "keys/ray-token", "keys/readme")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "keys/ray-token")
    assert sent(collect(folder)) == ["c.yaml", "keys/readme"]


def test_equal_files_make_equal_archives(tmp_path: Path) -> None:
    package = Package(tmp_path, {name: tree(tmp_path, name) / name for name in ("a/run.sh", "b.txt")})
    package.files["a/run.sh"].chmod(0o755)
    size = package.write(tmp_path / "one.zip")
    os.utime(tmp_path / "b.txt", (0, 0))
    package.write(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert size == (tmp_path / "one.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {
            "a/run.sh": "a/run.sh",
            "b.txt": "b.txt",
        }
        assert archive.getinfo("a/run.sh").external_attr >> 16 & 0o111, "a program stays one"


def test_what_ray_unpacks_is_what_was_collected(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import unzip_package

    package = Package(tmp_path, {name: tree(tmp_path, name) / name for name in ("only/a.py", "only/b/c.py")})
    package.write(tmp_path / "package.zip")
    unzip_package(str(tmp_path / "package.zip"), str(tmp_path / "out"), False, True)
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.py")}
    assert found == set(package.files)


@pytest.mark.parametrize("limit", [3_000, 90_000], ids=["within a file", "over all files"])
def test_too_large_a_package_names_its_largest_files(tmp_path: Path, limit: int) -> None:
    for name, size in {"small.py": 10, "model.bin": 60_000, "logs/day.parquet": 40_000}.items():
        tree(tmp_path, name)
        (tmp_path / name).write_bytes(os.urandom(size))
    package = Package(tmp_path, {name: tmp_path / name for name in ("logs/day.parquet", "model.bin", "small.py")})
    with pytest.raises(ConfigError, match=r"model\.bin \(0\.1 MB\), logs/day\.parquet \(0\.0 MB\).*\.rayignore"):
        package.write(tmp_path / "package.zip", limit)
    assert package.write(tmp_path / "package.zip", 200_000) < 200_000


def test_the_limit_is_ray_s() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    from rayfm.submission.package import LIMIT_BYTES

    assert LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    package = collect(tree(tmp_path, "a.py", "b.py"))
    (tmp_path / "b.py").unlink()
    with pytest.raises(ConfigError, match=r"cannot package .*b\.py: No such file"):
        package.write(tmp_path / "package.zip")


def test_a_config_must_be_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(tmp_path / "work", "conf/c.yaml", "secret.yaml", "runs/demo/config.yaml")
    tree(tmp_path, "elsewhere.yaml")
    (folder / ".gitignore").write_text("secret.yaml\n")
    package = collect(folder)
    monkeypatch.chdir(folder / "conf")
    assert package.name(Path("c.yaml"), "config") == "conf/c.yaml"
    assert package.name(folder / "conf" / ".." / "conf" / "c.yaml", "config") == "conf/c.yaml"
    with pytest.raises(ConfigError, match=r"config .*elsewhere\.yaml is outside the working directory .*--working-dir"):
        package.name(tmp_path / "elsewhere.yaml", "config")
    for left in ("secret.yaml", "runs/demo/config.yaml"):
        with pytest.raises(ConfigError, match=r"is left out of the package"):
            package.name(folder / left, "config")
    with pytest.raises(ConfigError, match="no such file"):
        package.name(folder / "none.yaml", "config")


def test_a_working_directory_may_be_reached_through_a_link(tmp_path: Path) -> None:
    folder = tree(tmp_path / "work", "c.yaml")
    (tmp_path / "link").symlink_to(folder)
    assert collect(tmp_path / "link").name(tmp_path / "link" / "c.yaml", "config") == "c.yaml"


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--working-dir .*none: no such folder"):
        collect(tmp_path / "none")
