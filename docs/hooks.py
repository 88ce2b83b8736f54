"""What the site adds to the pages of docs/, as hooks of mkdocs (mkdocs.yml; ``make docs``).

* A link from a page to a file of the repository outside docs/ becomes a link to that file on the code host. So pages
  keep relative links, which work on a code host and in an editor.
* Pages of the Python API, from docstrings, for the modules of `API`. They are made while the site is built: there is no
  file of them.
* A page that mkdocs.yml does not name yet stands in the section "More", so that it is found and the build stays green.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REVISION = "main"

API = (
    "rayfm",
    "rayfm.client",
    "rayfm.config",
    "rayfm.schema",
    "rayfm.data.sources.base",
    "rayfm.data.batch",
    "rayfm.models.base",
    "rayfm.distill.base",
    "rayfm.metrics.functions",
    "rayfm.metrics",
    "rayfm.labels",
    "rayfm.snapshots",
    "rayfm.report",
)
"""The public modules; each page begins with the module's docstring."""

_FENCE = re.compile(r"^( *)```.*?^\1```[^\n]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))|((?:src|href)=\")([^\"]+)(\")")


def linked(markdown: str, repository: str) -> str:
    """The page with its links out of docs/ as links to ``repository``, outside of code blocks."""

    def replaced(match: re.Match[str]) -> str:
        before, link, after = match.group(1, 2, 3) if match.group(1) else match.group(4, 5, 6)
        path, sharp, anchor = link.partition("#")
        if not path.startswith("../"):
            return match.group()
        inside = posixpath.normpath(posixpath.join(DOCS.name, path))
        kind = "tree" if (ROOT / inside).is_dir() else "blob"
        return f"{before}{repository.rstrip('/')}/{kind}/{REVISION}/{inside}{sharp}{anchor}{after}"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(replaced, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replaced, markdown[end:])])


def api_pages() -> dict[str, str]:
    """Path and text of each page of the Python API."""
    options = "    options: {show_root_heading: false}\n"
    return {f"api/{module}.md": f"# `{module}`\n\n::: {module}\n{options}" for module in API}


def _named(nav: Any) -> Iterator[str]:
    """Pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for item in nav.values():
            yield from _named(item)
    else:
        for item in nav:
            yield from _named(item)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation with the pages that it does not name, and those of the API."""
    nav = list(config.nav or ())
    named = set(_named(nav))
    more = [page.name for page in sorted(DOCS.glob("*.md")) if page.name not in named]
    if more:
        nav.append({"More": more})
    nav.append({"Python": [{module: f"api/{module}.md"} for module in API]})
    config.nav = nav
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files with the pages of the API."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text with links to the repository."""
    return linked(markdown, config.repo_url or "")


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings announce an example with two colons; one is enough on a page."""
    return html.replace("::</p>", ":</p>") if page.file.src_uri.startswith("api/") else html
