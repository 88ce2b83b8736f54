from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from rayfm.config import Config, ConfigError, Registry, apply_override, read_yaml, validate, write_yaml

PARTS = Registry("part")


class Width(Config):
    cells: int = 1


@PARTS.register("wheel")
class Wheel:
    class Config(Config):
        type: Literal["wheel"] = "wheel"
        radius: float = Field(1.0, gt=0)
        width: Width = Width()


@PARTS.register("engine")
class Engine:
    class Config(Config):
        type: Literal["engine"] = "engine"
        power: int = 10


class Row(Config):
    cell: str


class House(Config):
    name: str
    rows_: tuple[Row, ...] = Field((), alias="rows")
    front: Annotated[Config, PARTS] = Wheel.Config()
    parts: dict[str, tuple[Annotated[Config, PARTS], ...]] = {}
    colour: str | Width = "red"
    first: str | None = None
    built: datetime.datetime | None = None
    depth: Width | None = None
    rate: float = 0.5
    pair: tuple[int, Width] = (1, Width())


def complaint(data: dict) -> str:
    with pytest.raises(ConfigError) as error:
        validate(House, {"name": "h", **data}, "house.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"nmae": "x"}, "house.yaml: unknown key 'nmae'; did you mean 'name'?"),
        ({"row": []}, "house.yaml: unknown key 'row'; did you mean 'rows'?"),
        ({"rows": [{"cell": "a"}, {"cel": "b", "cell": "c"}]}, "unknown key 'rows.1.cel'; did you mean 'cell'?"),
        ({"front": {"type": "wheel", "raduis": 2}}, "unknown key 'front.raduis'; did you mean 'radius'?"),
        ({"front": {"type": "engine", "raduis": 2}}, "unknown key 'front.raduis'; known: power, type"),
        (
            {"front": {"type": "wheel", "width": {"cels": 2}}},
            "unknown key 'front.width.cels'; did you mean 'cells'?",
        ),
        # A key of the mapping that has the name of a part's type is still a key.
        (
            {"parts": {"wheel": [{"type": "engine"}, {"type": "wheel", "raduis": 2}]}},
            "unknown key 'parts.wheel.1.raduis'; did you mean 'radius'?",
        ),
        ({"depth": {"cel": 2}}, "unknown key 'depth.cel'; did you mean 'cells'?"),
        ({"colour": {"cels": 2}}, "unknown key 'colour.cels'; did you mean 'cells'?"),
        ({"pair": [1, {"cels": 2}]}, "unknown key 'pair.1.cels'; did you mean 'cells'?"),
        ({"front": {"type": "weel"}}, "house.yaml: 'front.type': unknown 'weel'; did you mean 'wheel'?"),
        ({"front": {"radius": 2}}, "'front': needs a 'type' key"),
        ({"parts": {"a": [{"type": "gear"}]}}, "'parts.a.0.type': unknown 'gear'; known: engine, wheel"),
        ({"rows": [{}]}, "'rows.0.cell' is missing; add it"),
        ({"rate": "fast"}, "'rate': Input should be a valid number, unable to parse string as a number (found 'fast')"),
        ({"front": {"type": "wheel", "radius": -1}}, "'front.radius': Input should be greater than 0 (found -1)"),
    ],
)
def test_a_complaint_names_the_key_and_the_nearest(data, expected):
    assert expected in complaint(data)


def test_every_complaint_is_a_line_of_its_own():
    lines = complaint({"nmae": 1, "rate": "fast", "front": {"type": "weel"}}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("house.yaml: ") for line in lines)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nrate: 1\nname: b\n", "line 3: key 'name' stands twice"),
        ("rows:\n  - {cell: a, cell: b}\n", "line 2: key 'cell' stands twice"),
        ("name: [1, 2\n", "line 2: not valid YAML"),
        ("- a\n- b\n", "expected a mapping at the top, found list"),
        ("", "expected a mapping at the top, found NoneType"),
        ("? [a, b]\n: 1\n", "line 1"),
    ],
)
def test_what_is_no_config_is_refused_by_line(tmp_path, text, expected):
    with pytest.raises(ConfigError) as error:
        read_yaml(write(tmp_path / "bad.yaml", text))
    assert expected in str(error.value)
    assert "bad.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        read_yaml(tmp_path / "binary.yaml")


def test_an_anchor_may_be_merged_and_overridden(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"
    assert read_yaml(write(tmp_path / "c.yaml", text))["b"] == {"x": 1, "y": 3}


def test_a_date_stays_the_period_that_it_names(tmp_path):
    data = read_yaml(write(tmp_path / "c.yaml", "name: h\nfirst: 2022-04-26\nbuilt: 2022-04-26 10:00:00\n"))
    house = validate(House, data)
    assert house.first == "2022-04-26"
    assert house.built == datetime.datetime(2022, 4, 26, 10)
    apply_override(data, "first=2022-04-27")
    assert validate(House, data).first == "2022-04-27"


def test_overrides_reach_mappings_and_lists():
    data = {"name": "h", "rows": [{"cell": "a"}, {"cell": "b"}]}
    for assignment in (
        "name=g",
        "rows.1.cell=c",
        "rate=0.25",
        "depth.cells=4",
        "front={type: engine, power: 3}",
        "front.power=5",
        "built=null",
    ):
        apply_override(data, assignment)
    house = validate(House, data)
    assert house.name == "g"
    assert [row.cell for row in house.rows_] == ["a", "c"]
    assert (house.rate, house.depth.cells, house.front.power, house.built) == (0.25, 4, 5, None)


def test_a_file_of_overrides_is_laid_over_key_by_key(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text("model: {width: 8}\nsizes: [1]\nnew: {a: 1}\n")
    data = {"model": {"width": 4, "depth": 2}, "sizes": [3, 4]}
    apply_override(data, f"@{path}")
    assert data == {"model": {"width": 8, "depth": 2}, "sizes": [1], "new": {"a": 1}}
    with pytest.raises(ConfigError, match=r"cannot read config .*gone\.yaml"):
        apply_override(data, f"@{tmp_path / 'gone.yaml'}")


def test_an_override_value_may_hold_an_equals_sign():
    data: dict = {}
    apply_override(data, "name=a=b")
    assert data == {"name": "a=b"}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("name", "write it as a.b=value"),
        ("=3", "write it as a.b=value"),
        ("a..b=3", "write it as a.b=value"),
        ("rows.2.cell=x", "'rows.2' is not a position in a list of 1"),
        ("rows.first.cell=x", "'rows.first' is not a position in a list of 1"),
        ("rows.-1=x", "'rows.-1' is not a position in a list of 1"),
        ("name.first=x", "'name' is a value, not a mapping"),
        ("rate=[1, 2", "not valid YAML"),
        ("front={a: 1, a: 2}", "stands twice"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(assignment, expected):
    data = {"name": "h", "rows": [{"cell": "a"}]}
    with pytest.raises(ConfigError) as error:
        apply_override(data, assignment)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_written_and_read_again_is_equal(tmp_path):
    house = House.model_validate(
        {
            "name": "2022-04-26",
            "rows": [{"cell": "yes"}, {"cell": "1"}, {"cell": "a: b"}],
            "front": {"type": "engine", "power": 7},
            "parts": {"x": [{"type": "wheel", "radius": 1e-8}, {"type": "engine"}]},
            "first": "2022-04-26T13",
            "built": "2022-04-26T13:00:00",
            "rate": 1e-9,
            "colour": {"cells": 3},
        }
    )
    write_yaml(house, tmp_path / "house.yaml")
    assert validate(House, read_yaml(tmp_path / "house.yaml")) == house


def test_a_config_cannot_be_changed():
    house = House(name="h")
    with pytest.raises(ValueError, match="frozen"):
        house.name = "g"
