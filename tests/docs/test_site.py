"""The site of docs/ builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import scripts

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return scripts.load("docs/hooks.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a link, an anchor or a page of the navigation that leads nowhere ends the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


class Loaded(html.parser.HTMLParser):
    """What a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        rel = (values.get("rel") or "").split()
        if tag == "link" and not {"canonical", "next", "prev", "edit", "alternate"} & set(rel):
            self.found.append(values.get("href") or "")
        self.found += [values[name] or "" for name in ("src", "srcset", "poster", "data") if name in values]
        # Two parts of the theme ask others: a repository's stars, and the script that draws mermaid.
        if values.get("data-md-component") == "source" or "mermaid" in (values.get("class") or "").split():
            self.found.append(f"https://{tag}")


def fetched(page: str) -> list[str]:
    parser = Loaded()
    parser.feed(page)
    return [address for address in parser.found if re.match(r"(https?:)?//", address)]


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ('<link rel="stylesheet" href="https://fonts.example/x.css">', 1),
        ('<script src="//cdn.example/x.js"></script><img src="https://x.example/y.png">', 2),
        ('<a data-md-component="source" href="https://x.example">x</a>', 1),
        ('<a href="https://x.example">x</a><img src="y.png"><link rel="stylesheet" href="z.css">', 0),
    ],
)
def test_what_a_page_fetches(page: str, count: int) -> None:
    assert len(fetched(page)) == count


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        assert fetched(page.read_text()) == [], page.relative_to(site)
    for style in (*site.glob("*.css"), *(site / "assets" / "stylesheets").glob("*.css")):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style.name


def test_every_page_is_there_and_python_stays_out(site: Path) -> None:
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in site.glob("*.html")}
    assert not list(site.rglob("*.py"))


def test_links_to_the_repository_lead_to_files_of_it(site: Path) -> None:
    """Pages link to files outside docs/ by relative paths; on the site these are addresses of the code host."""
    found = set()
    for page in site.glob("*.html"):
        text = page.read_text()
        assert not re.search(r'(?:href|src)="\.\./', text), page.name
        found |= set(re.findall(r'href="https://github\.com/rayfm/rayfm/(blob|tree)/main/([^"#]*)', text))
    assert len(found) > 50
    for kind, path in found:
        assert (ROOT / path).is_dir() if kind == "tree" else (ROOT / path).is_file(), path


def test_public_modules_have_a_page_with_their_docstrings(site: Path, hooks: ModuleType) -> None:
    for module in hooks.API:
        assert (site / "api" / f"{module}.html").is_file()
    text = (site / "api" / "rayfm.metrics.functions.html").read_text()
    assert "Normalised entropy" in text
    assert "::</p>" not in text


def test_links_in_code_stay_as_they_are(hooks: ModuleType) -> None:
    page = (
        "[a](../rayfm/cli/main.py#x) [b](labels.md)\n\n```\n[a](../rayfm)\n```\n\n"
        '<img src="../docs/flow.svg"> [c](../rayfm)'
    )
    assert hooks.linked(page, "https://host/r/") == (
        "[a](https://host/r/blob/main/rayfm/cli/main.py#x) [b](labels.md)\n\n```\n[a](../rayfm)\n```\n\n"
        '<img src="https://host/r/blob/main/docs/flow.svg"> [c](https://host/r/tree/main/rayfm)'
    )


def test_a_page_without_a_place_in_the_navigation_gets_one(hooks: ModuleType) -> None:
    from mkdocs.config.defaults import MkDocsConfig

    config = MkDocsConfig()
    config.nav = [{"Begin": [{"What": "index.md"}]}]
    nav = hooks.on_config(config).nav
    more = next(item["More"] for item in nav if "More" in item)
    assert "labels.md" in more
    assert "index.md" not in more


def test_tables_and_lists_are_what_they_are_on_a_code_host(site: Path) -> None:
    """Python's Markdown wants an empty line before them and four spaces inside, a code host does not."""
    for page in sorted(DOCS.glob("*.md")):
        text = re.sub(r"^( *)```.*?^\1```[^\n]*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        made = (site / f"{page.stem}.html").read_text()
        made = made[made.index("<article") : made.index("</article")]
        rows = len(re.findall(r"^\|(?! ?:?-{3})", text, re.MULTILINE))
        items = len(re.findall(r"^ *(?:[-*]|[1-9]\d*\.) ", text, re.MULTILINE))
        assert made.count("<tr>") == rows, f"{page.name}: rows of tables"
        assert made.count("<li>") == items, f"{page.name}: items of lists"
