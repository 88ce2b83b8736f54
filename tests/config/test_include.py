"""``{include: FILE}`` in a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfm.config import ConfigError, apply_override, read_yaml


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_list_a_mapping_and_a_value(tmp_path: Path) -> None:
    write(tmp_path / "lists" / "union.yaml", "# a comment\n- user\n- ad\n")
    write(tmp_path / "part.yaml", "model: {type: fm, features: {include: lists/union.yaml}}\n")
    write(tmp_path / "seeds.yaml", "[1, 2]\n")
    main = write(
        tmp_path / "deep" / "main.yaml",
        "students: {vm: {include: ../part.yaml}}\nseeds: {include: ../seeds.yaml}\n"
        "many: [{include: ../seeds.yaml}, 3]\n",
    )
    assert read_yaml(main) == {
        "students": {"vm": {"model": {"type": "fm", "features": ["user", "ad"]}}},
        "seeds": [1, 2],
        "many": [[1, 2], 3],
    }


def test_an_include_under_an_anchor_stays_one(tmp_path: Path) -> None:
    write(tmp_path / "list.yaml", "[a, b]\n")
    main = write(tmp_path / "main.yaml", "one: &x {features: {include: list.yaml}}\ntwo: *x\n")
    found = read_yaml(main)
    assert found["one"] == found["two"] == {"features": ["a", "b"]}
    assert found["one"] is found["two"]


def test_overrides_include_from_the_folder_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "here" / "list.yaml", "[a, b]\n")
    write(tmp_path / "there" / "over.yaml", "model: {features: {include: ../here/list.yaml}}\n")
    monkeypatch.chdir(tmp_path / "here")
    data: dict = {"model": {"type": "fm", "features": ["x"]}}
    apply_override(data, "model.features={include: list.yaml}")
    assert data == {"model": {"type": "fm", "features": ["a", "b"]}}
    data = {"model": {"type": "fm"}}
    apply_override(data, "@../there/over.yaml")
    assert data == {"model": {"type": "fm", "features": ["a", "b"]}}


def test_what_is_no_include_is_left(tmp_path: Path) -> None:
    main = write(tmp_path / "main.yaml", "tables: {include: {rows: 3}}\nother: {include: a, more: 1}\n")
    assert read_yaml(main) == {"tables": {"include": {"rows": 3}}, "other": {"include": "a", "more": 1}}


def test_bad_includes(tmp_path: Path) -> None:
    main = write(tmp_path / "main.yaml", "features: {include: nowhere.yaml}\n")
    with pytest.raises(ConfigError, match=r"cannot read config .*nowhere\.yaml: No such file"):
        read_yaml(main)
    write(tmp_path / "a.yaml", "[{include: b.yaml}]\n")
    write(tmp_path / "b.yaml", "[{include: a.yaml}]\n")
    main.write_text("features: {include: a.yaml}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml includes itself"):
        read_yaml(main)
    write(tmp_path / "bad.yaml", "- [a\n")
    main.write_text("features: {include: bad.yaml}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml line 2: not valid YAML"):
        read_yaml(main)
