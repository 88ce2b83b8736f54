"""README and docs agree with the code, and the examples of docs/extending.md run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scripts

from rayfm.data.sources.base import SOURCES
from rayfm.distill.base import OBJECTIVES
from rayfm.models.base import MODELS

ROOT = Path(__file__).resolve().parents[2]
EXTENDING = ROOT / "docs" / "extending.md"


@pytest.fixture
def registered_for_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone after it: other tests of the process go through all registered parts."""
    for registry in (MODELS, OBJECTIVES, SOURCES):
        parts = {name: registry[name] for name in registry}  # loads them, so that the examples' are the only new ones
        monkeypatch.setattr(registry, "_parts", parts)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return scripts.load("docs/check.py")


def section(title: str, language: str = "python") -> list[str]:
    """The code blocks below a heading of docs/extending.md."""
    text = EXTENDING.read_text()
    body = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert body is not None, title
    blocks = re.findall(rf"^```{language}\n(.*?)^```", body.group(1), re.MULTILINE | re.DOTALL)
    assert blocks, title
    return blocks


def execute(blocks: list[str], **names: Any) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "extending", **names}
    for block in blocks:
        exec(compile(block, "<extending>", "exec"), namespace)
    return namespace


def test_pages_agree_with_the_code(check: ModuleType) -> None:
    assert check.problems() == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[gone](nowhere.md)", "nowhere.md"),
        ("[gone](concepts.md#no-such-words)", "no such heading"),
        ("`rayfm prepair examples/demo.yaml`", "prepair"),
        ("```sh\nrayfm run examples/demo.yaml --resum\n```", "--resum"),
        ("```sh\nrayfm run examples/demo.yaml --set data.lane=4\n```", "data.lane"),
        ("```sh\nrayfm run examples/gone.yaml\n```", "gone.yaml"),
        ("```yaml\nschedule: {warmup: none}\n```", "schedule.warmup"),
        ("```yaml\nstudents: {small: {model: {type: dlmr}}}\n```", "dlrm"),
        ("```python\nimport rayfm\nrayfm.label(config, teacher=1)\n```", "teacher"),
        ("```python\nimport rayfm\nrayfm.learn(config)\n```", "learn"),
    ],
)
def test_what_is_wrong_is_found(check: ModuleType, tmp_path: Path, text: str, complaint: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    (tmp_path / "concepts.md").write_text("# Concepts\n")
    found = [*check.check_links(page), *check.check_yaml(page), *check.check_python(page)]
    for command in check.commands(page):
        found += check.check_command(page, command)
    assert len(found) == 1, found
    assert complaint in found[0]


def test_a_stale_reference_is_found(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "configuration.md"
    page.write_text(check.generate.PAGE.read_text().replace("| `lanes` |", "| `slices` |"))
    monkeypatch.setattr(check.generate, "PAGE", page)
    assert "generate.py" in next(check.check_reference())


def test_every_key_is_in_the_reference(check: ModuleType) -> None:
    text = check.generate.PAGE.read_text()
    for section_ in check.generate.sections():
        for name, field in section_.model.model_fields.items():
            assert f"| `{field.alias or name}` |" in text


@pytest.mark.usefixtures("registered_for_the_test")
@pytest.mark.parametrize("title", ["A model", "An objective", "A metric"])
def test_extending(title: str) -> None:
    execute(section(title))


@pytest.mark.usefixtures("registered_for_the_test")
def test_extending_source(ray_session: None, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    day = 1_735_689_600_000_000
    (logs / "2025-01-01.csv").write_text(
        "time,user,price,click\n" + "".join(f"{day + i},{i},{i}.5,{i % 2}\n" for i in range(3))
    )
    (logs / "2025-01-02.csv").write_text(
        "time,user,price,click\n" + "".join(f"{day + 86_400_000_000 + i},{i},{i}.5,{i}\n" for i in range(3))
    )
    execute(section("A source"), folder=tmp_path)


def test_extending_config() -> None:
    # In a process of its own: a config knows the parts that are registered when its class is made.
    program = "\n".join(
        [
            "import sys",
            f"sys.path.insert(0, {str(EXTENDING.parent)!r})",
            "namespace = {'__name__': 'extending'}",
            *(
                f"exec({block!r}, namespace)"
                for block in (section("A model")[0], section("An objective")[0], section("A source")[0])
            ),
            "import check",
            f"found = list(check.check_yaml(check.Path({str(EXTENDING)!r})))",
            "assert found == [], found",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
