"""Every command of README and docs is run by a test, or its page says what it needs.

A command is a line of a block of shell in README.md, CONTRIBUTING.md and docs/. It is run by what
tests/docs/commands.yaml names, in its quick form where it takes long; or the reader sees why it is not:

* ``# needs a server``, ``# takes hours`` and the like (`MARK`) at the end of the line, or on a line of its own for what
  follows in the block;
* ``**Commands on this page need a cloud.**`` or ``**None of it was ever run on a cluster.**`` (`PAGE_MARK`), at the
  beginning of a paragraph, for a whole page.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import scripts
import yaml

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = Path(__file__).with_name("commands.yaml")
REGISTERED: dict[str, str] = yaml.safe_load(REGISTRY.read_text())

WHAT = r"(?:a cloud|a cluster|a server|root|a GPU|the data|the network|hours)"
MARK = re.compile(rf"#.*\b((?:needs|takes) {WHAT}|not run here)\b")
PAGE_MARK = re.compile(
    rf"^(> )?\*\*(Commands on this page (?:need|take) {WHAT}|(None of it|Nothing of it|Neither) was ever run\b)",
    re.MULTILINE,
)
SHELLS = ("sh", "bash", "console", "shell")
PROGRAMS = re.compile(
    r"^\$? ?(?:\.venv/bin/)?(rayfm|python3?|pip|make|ray|git|kubectl|curl|docker|helm|aws|gcloud) ", re.M
)
SILENT = ("cd", ".", "source", "export")
"""What only prepares the commands after it."""


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return scripts.load("docs/check.py")


def commands(block: str) -> Iterator[tuple[str, bool]]:
    """Each command of a block of shell, and whether it carries a mark. A quotation may span lines."""
    marked_from_here, waiting = False, ""
    for line in block.replace("\\\n", " ").splitlines():
        if not waiting and line.lstrip().startswith("#"):
            marked_from_here = marked_from_here or bool(MARK.search(line))
            continue
        waiting = f"{waiting}\n{line}" if waiting else line
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # an open quotation
            continue
        marked = marked_from_here or bool(MARK.search(waiting))
        part: list[str] = []
        for word in [*words, "&&"]:
            if word not in ("&&", "||", "|", ";"):
                part.append(word)
                continue
            if part and part[0] not in SILENT:
                yield " ".join(part).removeprefix("$ ").removeprefix(".venv/bin/"), marked
            part = []
        waiting = ""
    assert not waiting, f"a quotation that does not end: {waiting}"


def runner(command: str) -> str | None:
    """What runs a command, of tests/docs/commands.yaml."""
    return next((by for pattern, by in REGISTERED.items() if re.fullmatch(pattern, command, re.DOTALL)), None)


def unaccounted(check: ModuleType, page: Path) -> Iterator[str]:
    """Commands of a page that nothing runs and that carry no mark."""
    if PAGE_MARK.search(page.read_text()):
        return
    for line, block in check.blocks(page, *SHELLS):
        for command, marked in commands(block):
            if not marked and runner(command) is None:
                yield f"{page.name}, block at line {line}: {command}"
    for line, block in check.blocks(page, ""):
        if PROGRAMS.search(block):
            yield f"{page.name}, block at line {line}: commands in a block without a language; begin it with ```sh"


def test_every_command_is_run_by_a_test_or_says_what_it_needs(check: ModuleType) -> None:
    found = [problem for page in check.PAGES for problem in unaccounted(check, page)]
    assert found == [], "name what runs it in tests/docs/commands.yaml, or mark it (# needs a server, # takes hours)"


def test_what_is_said_to_run_them_exists(check: ModuleType) -> None:
    all_commands = {
        command for page in check.PAGES for _, block in check.blocks(page, *SHELLS) for command, _ in commands(block)
    }
    said = [pattern for pattern in REGISTERED if not pattern.startswith(("make d", "python docs"))]  # the rest in prose
    assert [
        pattern for pattern in said if not any(re.fullmatch(pattern, command, re.DOTALL) for command in all_commands)
    ] == [], "no such command"
    texts = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"^def (test_\w+)\(", texts, re.MULTILINE))
    for by in set(REGISTERED.values()) - {"as written", "needs a GPU"}:
        assert by in names or (ROOT / by).is_file(), f"{by}: no such test"


def as_written() -> list[str]:
    module = scripts.load("docs/check.py")
    return sorted(
        {
            command
            for page in module.PAGES
            for _, block in module.blocks(page, *SHELLS)
            for command, marked in commands(block)
            if runner(command) == "as written" and not marked
        }
    )


@pytest.mark.parametrize("command", as_written())
def test_commands_as_written(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rayfm.cli.main import main

    words = shlex.split(command.split(" > ")[0])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    # A machine may be too small for the plan; then `doctor` says so, and ends with 1.
    assert not code or words[1] == "doctor", err
    assert out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("```sh\nrayfm select CONFIG\n```", 0),
        ("```sh\nrayfm dance\n```", 1),
        ("```sh\nrayfm dance   # needs a GPU\n```", 0),
        ("```sh\nrayfm dance   # on two cores\n```", 1),
        ("```sh\n# needs a server\nrayfm dance\nrayfm sing\n```", 0),
        ("```sh\nrayfm sing\n# takes hours\nrayfm dance\n```", 1),
        ("```sh\nmake install && rayfm dance | less\n```", 2),
        ("```sh\ncd folder\nexport X=1\n```", 0),
        ("```sh\ncurl x -d '{\n  rayfm: 1}'   # needs a server\n```", 0),
        ("```\nrayfm dance\n```", 1),
        ("```\nerror: rayfm cannot\n```", 0),
        ("> **Commands on this page need a cloud.**\n\n```sh\nrayfm dance\n```", 0),
        ("**None of it was ever run on a cluster**, alas.\n\n```sh\nrayfm dance\n```", 0),
        ("```sh\nrayfm sing   # not run here: it does not end\n```", 0),
        ("Commands on this page need a cloud.\n\n```sh\nrayfm dance\n```", 1),
    ],
)
def test_an_unaccounted_command_is_found(check: ModuleType, tmp_path: Path, text: str, complaints: int) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    assert len(list(unaccounted(check, page))) == complaints
