"""`rayfm select` from end to end on a world with planted features: once on Ray, else in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from planted import CONSIDERED, DAYS, NOISE, PLANTED, mapping, planted
from rich.console import Console

from rayfm.cli import select as command
from rayfm.config import ConfigError
from rayfm.pipeline import select as job
from rayfm.pipeline.config import load_config
from rayfm.pipeline.select import SelectJob, select
from rayfm.selection.job import score_on_ray
from rayfm.selection.scoring import ItemScorer


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_planted_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = planted(tmp_path)
    result = select(config, here=True)
    found = result.selection
    assert (found.trained, found.withheld) == (DAYS[:3], DAYS[3:4]), "the fifth is a test period"

    # What matters on considerations alone: its ranking and the union find it, impressions alone miss it.
    assert set(found.lists["impressions_only"]) == set(PLANTED)
    assert CONSIDERED in found.lists["considerations_only"]
    assert set(found.lists["union"]) == {*PLANTED, CONSIDERED}
    assert CONSIDERED not in found.lists["intersection"]
    assert len(found.lists["union_of_size"]) <= 2
    chosen = {name for names in found.lists.values() for name in names}
    assert chosen.isdisjoint(NOISE), "noise is chosen by no way"
    for kind in ("impression", "consideration"):
        assert not any(found.measured[kind].features[name].matters for name in NOISE)
    # A generous k finds no more: the noise is not among the features that matter.
    generous = planted(tmp_path, top_k=5)
    assert set(generous.select.dump()) == set(config.select.dump())

    # A list is taken up by a config.
    path = tmp_path / "with_list.yaml"
    whole = mapping(tmp_path)
    whole["students"]["vm"]["model"]["features"] = {"include": str(result.list_file("union"))}
    path.write_text(yaml.safe_dump(whole))
    assert set(load_config(path).students["vm"].model.features or ()) == {*PLANTED, CONSIDERED}

    # The files.
    saved = json.loads((result.folder / "selection.json").read_text())
    assert saved["lists"]["union"] == list(found.lists["union"])
    lines = (result.folder / "selection.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 5
    assert lines[0].startswith("feature,kind,rank,mean,deviation")
    assert (result.folder / "selection.png").read_bytes().startswith(b"\x89PNG")
    out = io.StringIO()
    monkeypatch.setattr(command, "console", Console(file=out, width=80))
    command.print_selection(result)
    shown = [line for line in out.getvalue().splitlines() if str(tmp_path) not in line]
    assert max(map(len, shown)) <= 80, out.getvalue()
    assert any(line.startswith(CONSIDERED) for line in shown)

    # Another call finds it done; a lost item is scored again, and nothing else; Ray's actors give the same bytes.
    monkeypatch.setattr(job, "run_here", lambda *_: pytest.fail("trained again"))
    assert select(config, resume=True, here=True).selection == found
    (items,) = (result.folder / "items").iterdir()
    before = {path.name: path.read_bytes() for path in items.iterdir()}
    assert len(before) == 2 * 4
    lost = sorted(items.iterdir())[3]
    lost.unlink()
    (result.folder / "selection.json").unlink()
    scored: list[str] = []
    measure = ItemScorer.measure
    monkeypatch.setattr(ItemScorer, "measure", lambda self, item: scored.append(item) or measure(self, item))
    assert select(config, resume=True, here=True).selection == found
    assert len(scored) == 1
    for path in items.iterdir():
        path.unlink()
    seen: list[tuple[int, int]] = []
    score_on_ray(*SelectJob(config, here=True).measured(), cpus=0.5, watch=lambda *done: seen.append(done))
    assert len(scored) == 1, "scored in the actors"
    assert (seen[0], seen[-1]) == ((0, 8), (8, 8))
    assert {path.name: path.read_bytes() for path in items.iterdir()} == before

    with pytest.raises(ConfigError, match="holds a selection; --resume goes on with it, --overwrite starts anew"):
        select(config, here=True)
    with pytest.raises(ConfigError, match="'select' differs from the selection asked for"):
        select(generous, resume=True, here=True)
