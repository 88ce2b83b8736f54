from __future__ import annotations

import importlib
import importlib.metadata
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import jsonschema
import pytest
from pydantic import TypeAdapter

from rayfm.config import Config, Registry, nearest


class Plug:
    """A part that another distribution brings."""

    class Config(Config):
        type: Literal["plug"] = "plug"
        pins: int = 3

    def __init__(self, config: Plug.Config, length: int = 0) -> None:
        self.config, self.length = config, length


def test_nearest_names_one_or_all():
    assert nearest("dcn", ["dcnv2", "dlrm"]) == "; did you mean 'dcnv2'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""


def test_an_unknown_part_names_the_nearest():
    registry = Registry("part")
    registry.register("plug")(Plug)
    with pytest.raises(KeyError, match=r"unknown part 'plugg'; did you mean 'plug'\?"):
        registry["plugg"]


def test_build_hands_the_config_and_the_rest_on():
    registry = Registry("part")
    registry.register("plug")(Plug)
    built = registry.build(Plug.Config(pins=5), length=2)
    assert isinstance(built, Plug)
    assert (built.config.pins, built.length) == (5, 2)


def test_one_name_is_one_part():
    registry = Registry("part")
    registry.register("plug")(Plug)
    registry.register("plug")(Plug)  # a module that is imported twice

    with pytest.raises(ValueError, match="two part parts are called 'plug'"):
        registry.register("plug")(Registry)


def test_modules_of_the_packages_register_themselves_at_the_first_look_up(tmp_path, monkeypatch):
    package = tmp_path / "rayfm_test_parts"
    package.mkdir()
    (package / "__init__.py").write_text("from rayfm.config import Registry\nPARTS = Registry('part', __name__)\n")
    (package / "one.py").write_text(
        "from typing import Literal\nfrom rayfm.config import Config\nfrom rayfm_test_parts import PARTS\n"
        "@PARTS.register('one')\nclass One:\n    class Config(Config):\n        type: Literal['one'] = 'one'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import rayfm_test_parts

    assert "rayfm_test_parts.one" not in sys.modules
    assert list(rayfm_test_parts.PARTS) == ["one"]
    assert "rayfm_test_parts.one" in sys.modules


def test_other_distributions_add_parts_by_entry_point(monkeypatch):
    registry = Registry("part")

    class Point:
        def load(self) -> None:
            registry.register("plug")(Plug)

    asked = []

    def entry_points(group: str) -> list[Point]:
        asked.append(group)
        return [Point()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert list(registry) == ["plug"]
    assert registry["plug"] is Plug
    assert asked == ["rayfm.part"]


def test_an_annotated_field_takes_any_part_and_its_json_schema_says_so():
    registry = Registry("part")
    registry.register("plug")(Plug)

    @registry.register("cord")
    class Cord:
        class Config(Config):
            type: Literal["cord"] = "cord"
            metres: float = 1.0

    adapter = TypeAdapter(Annotated[Config, registry])
    assert adapter.validate_python({"type": "cord", "metres": 2}) == Cord.Config(metres=2.0)
    assert adapter.validate_python(Plug.Config(pins=4)) == Plug.Config(pins=4)
    schema = adapter.json_schema()
    jsonschema.validate({"type": "plug", "pins": 4}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"type": "plug", "metres": 4.0}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"type": "socket"}, schema)


def test_threads_that_look_up_while_the_packages_load_wait_for_them(tmp_path, monkeypatch):
    package = tmp_path / "rayfm_slow_parts"
    package.mkdir()
    (package / "__init__.py").write_text("from rayfm.config import Registry\nPARTS = Registry('part', __name__)\n")
    (package / "one.py").write_text(
        "import time\nfrom rayfm_slow_parts import PARTS\nassert not list(PARTS)\ntime.sleep(0.2)\n"
        "@PARTS.register('one')\nclass One:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = importlib.import_module("rayfm_slow_parts").PARTS
    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(list, parts) for _ in range(4)]]
    assert found == [["one"]] * 4
