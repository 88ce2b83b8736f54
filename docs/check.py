"""Checks README and docs against the code: ``python docs/check.py`` (also ``make docs``). Exits 1 with what is wrong.

* The reference in configuration.md is what the config classes say.
* Every relative link and every anchor leads somewhere.
* Every ``rayfm ...`` command parses; the config that it names, with its ``--set``, is valid.
* Every YAML block is a valid config, or a part of one: a part is put in place of the same keys of the first whole
  config of configuration.md, or, on the pages of commands with a file of their own, of examples/feedback_join.yaml or
  examples/near_line.yaml.
* Every call of a ``rayfm.<function>`` in a Python block fits the function's signature.

A word in capitals (CONFIG, FOLDER) in a command is a placeholder.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
if str(DOCS) not in sys.path:
    sys.path.insert(0, str(DOCS))

import generate  # noqa: E402  (it stands beside this file)

from rayfm.augment.config import AugmentConfig, load_augment  # noqa: E402
from rayfm.config import RayfmError, read_yaml, validate  # noqa: E402
from rayfm.pipeline.config import PipelineConfig, load_config  # noqa: E402
from rayfm.serving.nearline.config import NearLineConfig, load_nearline  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`(rayfm [^`\n]+)`(?!`)")


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line number, text) of a page's fenced blocks in these languages."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start()) + 1, match.group(2))
        for match in _FENCE.finditer(text)
        if match.group(1) in languages
    ]


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings; a repeated heading gets -1, -2, ... as on GitHub."""
    found: set[str] = set()
    for title in _HEADING.findall(_prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = base = generate.slug(plain)
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{base}-{count}"
        found.add(anchor)
    return found


def check_reference() -> Iterator[str]:
    """Whether configuration.md holds what `generate` makes."""
    text = generate.PAGE.read_text()
    if generate.page(text) != text:
        yield "docs/configuration.md: the reference is not what the config classes say; run python docs/generate.py"
    text = generate.AUGMENT_PAGE.read_text()
    if generate.page(text, generate.augment_reference) != text:
        yield "docs/augmentation.md: the reference is not what the config classes say; run python docs/generate.py"
    text = generate.NEARLINE_PAGE.read_text()
    if generate.page(text, generate.nearline_reference) != text:
        yield "docs/nearline.md: the reference is not what the config classes say; run python docs/generate.py"
    text = generate.OPERATIONS_PAGE.read_text()
    if generate.page(text, generate.metrics_reference) != text:
        yield "docs/operations.md: the table is not that of rayfm/operations/metrics.py; run python docs/generate.py"


def check_links(page: Path) -> Iterator[str]:
    """Relative links and anchors of a page that lead nowhere."""
    for plain, quoted in _LINK.findall(_prose(page)):
        link = plain or quoted
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path)
        if not target.exists():
            yield f"{page.name}: link to {link!r}, which is not there"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{page.name}: link to {link!r}: no such heading"


def commands(page: Path) -> list[str]:
    """The ``rayfm`` commands of a page: lines of shell blocks, and inline code."""
    found = []
    for _, text in blocks(page, "sh", "bash", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\||>", line.split(" #")[0].removeprefix("$ ")):
                word = part.strip().removeprefix(".venv/bin/")
                if word.startswith("rayfm "):
                    found.append(word)
    return found + _INLINE.findall(_prose(page))


def check_command(page: Path, command: str) -> Iterator[str]:
    """What the command line says against a command, and the loader against its config."""
    from rayfm.cli.main import app

    words = shlex.split(command)[1:]
    part: Any = typer.main.get_command(app)
    context: Any = part.make_context("rayfm", list(words) or ["--help"], resilient_parsing=True)
    context.resilient_parsing = False
    try:
        while hasattr(part, "resolve_command"):  # a group of commands
            if not words or words == ["--help"]:
                return
            name, part, words = part.resolve_command(context, words)
            if words == ["--help"] or (not words and command in _INLINE.findall(_prose(page))):
                return  # the name of a command, in a sentence
            context = part.make_context(name, list(words), parent=context)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer brings its own copy of Click: no class to name
            raise
        yield f"{page.name}: `{command}`: {error.format_message()}"
        return
    file = context.params.get("file")
    if context.parent is not None and context.parent.info_name == "nearline" and not str(file).isupper():
        try:
            load_nearline(ROOT / str(file))
        except RayfmError as error:
            yield f"{page.name}: `{command}`: {str(error).splitlines()[0]}"
        return
    config = context.params.get("config")
    if config is None or str(config).isupper() or f"Save this as `{config}`" in page.read_text():
        return  # a page's own file is one of its YAML blocks, which `check_yaml` reads
    sets = [item for item in context.params.get("set_") or [] if not item.isupper()]
    try:
        if context.info_name == "augment":
            load_augment(ROOT / str(config), sets)
            return
        load_config(ROOT / str(config), sets, context.params.get("data"))
    except RayfmError as error:
        yield f"{page.name}: `{command}`: {str(error).splitlines()[0]}"


def _whole(config: Any) -> bool:
    return isinstance(config, dict) and {"name", "data", "schema", "schedule", "students"} <= config.keys()


def base_config() -> dict[str, Any]:
    """The first whole config of configuration.md."""
    for _, text in blocks(generate.PAGE, "yaml"):
        config = yaml.safe_load(text)
        if _whole(config):
            found: dict[str, Any] = config
            return found
    raise ValueError("docs/configuration.md has no whole config")


def check_yaml(page: Path) -> Iterator[str]:
    """What the loader says against the YAML blocks of a page."""
    base = base_config()
    join = read_yaml(ROOT / "examples" / "feedback_join.yaml")
    near_line = read_yaml(ROOT / "examples" / "near_line.yaml")
    for line, text in blocks(page, "yaml"):
        where = f"{page.name}, line {line}"
        try:
            config = yaml.safe_load(text)
            if page == generate.AUGMENT_PAGE:
                validate(AugmentConfig, join | config, where)
                continue
            if page == generate.NEARLINE_PAGE and "teachers" not in config:  # else it is of a pipeline
                validate(NearLineConfig, near_line | config, where)
                continue
            validate(PipelineConfig, config if _whole(config) else base | config, where)
        except (yaml.YAMLError, RayfmError, TypeError) as error:
            yield str(error).splitlines()[0]


def check_python(page: Path) -> Iterator[str]:
    """Calls of rayfm's functions that do not fit them."""
    import rayfm

    for line, text in blocks(page, "python"):
        where = f"{page.name}, line {line}"
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            yield f"{where}: {error}"
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "rayfm"):
                continue
            try:
                function = getattr(rayfm, node.func.attr)
                inspect.signature(function).bind(*node.args, **{k.arg: None for k in node.keywords if k.arg})
            except (AttributeError, TypeError) as error:
                yield f"{where}: rayfm.{node.func.attr}: {error}"


def problems() -> list[str]:
    """Everything that is wrong, one line each."""
    found = list(check_reference())
    for page in PAGES:
        found += check_links(page)
        for command in commands(page):
            found += check_command(page, command)
        if page.name != "extending.md":  # its parts exist only once its Python blocks ran: see tests/docs
            found += check_yaml(page)
        found += check_python(page)
    return found


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wrong = problems()
    for problem in wrong:
        print(problem, file=sys.stderr)
    count = sum(len(commands(page)) for page in PAGES)
    print(f"{len(PAGES)} pages, {count} commands: {len(wrong)} problems")
    sys.exit(1 if wrong else 0)
