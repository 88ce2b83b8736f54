"""The package that a job runs in: the working directory, less what is no part of the program, as one archive.

Ray would make one too, and keeps to ``.gitignore`` and ``.rayignore`` as well. This one is looked at before it is sent:
a package that the job server would refuse names its largest files, and a config that would be left out is found here.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import rayfm
from rayfm.config import ConfigError

LIMIT_BYTES = 100 * 2**20
"""What Ray's job server takes (``DASHBOARD_CLIENT_MAX_SIZE``); the store that it puts a package in would take more."""

IGNORE_FILES = (".gitignore", ".rayignore")
LEFT_OUT = frozenset(
    {".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".tox"}
    | {".import_linter_cache", ".ipynb_checkpoints", "node_modules", ".env"}
)
"""Names that are left out wherever they stand."""
LEFT_OUT_AT_TOP = frozenset({"runs", "data"})
"""Names that are left out at the top: what runs read and write, by default."""

_CHUNK_BYTES = 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Every file's time, so that equal files make an equal archive, which Ray keeps and is not sent twice."""


@dataclasses.dataclass(frozen=True)
class Package:
    """Files that go to the cluster.

    Attributes:
        folder: the working directory.
        files: name in the package -> the file, in order of the names.
        own: whether the working directory has no ``rayfm`` of its own, and the installed one goes with it.
    """

    folder: Path
    files: dict[str, Path]
    own: bool = False

    def name(self, path: Path, what: str) -> str:
        """The name that a file of this machine has in the package, as the job reads it.

        Raises:
            ConfigError: it is outside the working directory, or left out.
        """
        absolute = Path(os.path.abspath(path))
        if not absolute.exists():
            raise ConfigError(f"{what} {path}: no such file")
        for candidate, root in ((absolute, Path(os.path.abspath(self.folder))), (absolute.resolve(), self.folder)):
            if candidate.is_relative_to(root):
                name = candidate.relative_to(root).as_posix()
                if name in self.files:
                    return name
                raise ConfigError(
                    f"{what} {path} is left out of the package (by {' or '.join(IGNORE_FILES)}, or as what a run "
                    "writes); move it, or let a line in the ignore file spare it"
                )
        raise ConfigError(
            f"{what} {path} is outside the working directory {self.folder}; move it there, or name a folder that "
            "holds it with --working-dir"
        )

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name, or one below a folder of this name."""
        name = os.path.normpath(name)
        return name == "." or name in self.files or any(known.startswith(f"{name}/") for known in self.files)

    def write(self, target: Path, limit: int | None = None) -> int:
        """Write the archive; returns its size in bytes. Equal files make equal archives.

        Args:
            target: the ``.zip`` file.
            limit: bytes that it must stay below; by default those of Ray's job server.

        Raises:
            ConfigError: it would be as large or larger (the largest files are named), or a file cannot be read.
        """
        limit = LIMIT_BYTES if limit is None else limit
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, path in self.files.items():
                self._add(archive, name, path, limit)
        size = target.stat().st_size
        if size >= limit:
            raise self._too_large(limit)
        return size

    def _add(self, archive: zipfile.ZipFile, name: str, path: Path, limit: int) -> None:
        info = zipfile.ZipInfo(name, _EPOCH)
        info.compress_type = zipfile.ZIP_DEFLATED
        try:
            info.external_attr = (path.stat().st_mode & 0xFFFF) << 16
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    sink.write(chunk)
                    if archive.fp is not None and archive.fp.tell() >= limit:  # not a terabyte first, then the refusal
                        raise self._too_large(limit)
        except OSError as error:
            raise ConfigError(
                f"cannot package {path}: {error.strerror}; make it readable, or name it in .rayignore"
            ) from None

    def _too_large(self, limit: int) -> ConfigError:
        sizes = sorted(((path.stat().st_size, name) for name, path in self.files.items()), reverse=True)
        largest = ", ".join(f"{name} ({megabytes(size)})" for size, name in sizes[:5])
        return ConfigError(
            f"{self.folder}: the package is {megabytes(limit)} or more, which Ray's job server refuses; the largest of "
            f"its {len(self.files)} files: {largest}. Name what the job does not need in .rayignore (written as "
            ".gitignore is), or another folder with --working-dir"
        )


def megabytes(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 1e6:.1f} MB"


def collect(folder: Path, left_out: Iterable[Path] = ()) -> Package:
    """What of a folder goes to the cluster, and ``rayfm`` itself where the folder has none.

    Left out are version control, environments and caches; ``.env`` and the file of Ray's token; ``runs`` and ``data``
    at the top; what ``.gitignore`` (of this folder, those below and those above up to the repository's top) or
    ``.rayignore`` names. Ray's variable ``RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1`` lets ``.gitignore`` not count.

    Args:
        folder: the working directory.
        left_out: folders and files besides.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder}: no such folder")
    folder = folder.resolve()
    besides = {Path(os.path.abspath(path)) for path in left_out} | {folder / name for name in LEFT_OUT_AT_TOP}
    if token := os.environ.get("RAY_AUTH_TOKEN_PATH"):  # whoever may read the package would have it
        besides.add(Path(token).resolve())
    above = _rules_above(folder)
    if any(rule.excludes(folder, True) for rule in above):
        above = []  # the folder itself is ignored, and yet it was named
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder, above, besides, (folder,))}
    own = "rayfm/__init__.py" not in files
    if own:
        root = Path(rayfm.__file__).resolve().parent
        files |= {f"rayfm/{path.relative_to(root).as_posix()}": path for path in _walk(root, [], set(), (root,))}
    return Package(folder, dict(sorted(files.items())), own)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What an ignore file says of all that is below its folder."""

    folder: Path
    patterns: Any

    def excludes(self, path: Path, is_folder: bool) -> bool:
        name = path.relative_to(self.folder).as_posix()
        return bool(self.patterns.match_file(f"{name}/" if is_folder else name))


def _rules(folder: Path) -> list[_Rules]:
    """Those of a folder's own ignore files."""
    # Ray's copy of the library that it reads the same files with.
    from ray._private.thirdparty.pathspec.pathspec import PathSpec

    ignored = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") == "1"
    found = []
    for name in IGNORE_FILES[1:] if ignored else IGNORE_FILES:
        path = folder / name
        if path.is_file():
            found.append(_Rules(folder, PathSpec.from_lines("gitwildmatch", path.read_text().splitlines())))
    return found


def _rules_above(folder: Path) -> list[_Rules]:
    """Those of the folders above, up to the top of the repository that the folder is in; none outside of one."""
    above = [] if (folder / ".git").exists() else list(folder.parents)
    top = next((depth for depth, parent in enumerate(above) if (parent / ".git").exists()), None)
    return [] if top is None else [rule for parent in above[: top + 1] for rule in _rules(parent)]


def _walk(folder: Path, rules: list[_Rules], besides: set[Path], within: tuple[Path, ...]) -> Iterator[Path]:
    """The files below a folder. Links are followed, but not into a folder that we are in (``within``)."""
    rules = [*rules, *_rules(folder)]
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        if path.name in LEFT_OUT or path in besides or any(rule.excludes(path, is_folder) for rule in rules):
            continue
        if is_folder:
            real = path.resolve()
            if real not in within:
                yield from _walk(path, rules, besides, (*within, real))
        elif path.is_file():  # no sockets, no links to nothing
            yield path
