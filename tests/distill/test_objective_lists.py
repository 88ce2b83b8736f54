"""A model's whole list of objectives: the default term, what takes its place, what is left once they are dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_batches import SCHEMA, TASKS, max_difference, random_batch, small_config, small_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rayfm.config import ConfigError
from rayfm.distill import OBJECTIVES
from rayfm.distill.build import build_objectives
from rayfm.distill.supervised import Supervised
from rayfm.export.served import ServedModel, export_model
from rayfm.models import Model

CLICK = {"tasks": ("click",)}
FM = {"teacher": "fm", **CLICK}
NEW: dict[str, dict[str, Any]] = {
    "supervised": {"traffics": ("all",)},
    "cross_stage": {"next_stage": "fm"},
    "dependent_task": FM,
    "auxiliary_task": FM,
    "self_auxiliary": {**CLICK, "selector": "curriculum"},
    "selected_label": FM,
}


def configs(*kinds: str, **changes: Any) -> list[Any]:
    return [OBJECTIVES[kind].Config(**{**NEW[kind], **changes}) for kind in kinds]


def learnt(*own: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The supervised terms of a model with these objectives, with their tasks; then the others."""
    built = build_objectives(own, SCHEMA, TASKS, 4)
    return [
        (part.config.label, tuple(task.name for task in part.learnt) if isinstance(part, Supervised) else ())
        for part in built
    ]


def test_the_default_term_stands_where_nothing_takes_its_place() -> None:
    assert learnt() == [("supervised", TASKS)]
    assert learnt(*configs("cross_stage")) == [("supervised", TASKS), ("cross_stage", ())]
    assert learnt(*configs("cross_stage", replace_labels=True)) == [("cross_stage", ())]
    assert learnt(*configs("supervised")) == [("supervised", TASKS)]
    assert learnt(*configs("supervised", **CLICK)) == [("supervised", ("watch",)), ("supervised", ("click",))]
    assert learnt(*configs("selected_label")) == [("supervised", ("watch",)), ("selected_label", ())]


def test_a_variants_own_term_is_the_one_that_is_used() -> None:
    batch = random_batch()
    model = small_model("fm")
    (own,) = build_objectives(configs("supervised", traffics=("all",)), SCHEMA, TASKS, model.representation_dim)
    (default,) = build_objectives([], SCHEMA, TASKS, model.representation_dim)
    for name, term in default(batch, model(batch)).items():
        assert torch.equal(own(batch, model(batch))[name].weighted_sum, term.weighted_sum)
    batch.traffic += 1  # a traffic that it does not see
    assert all(term.weight.item() == 0 for term in own(batch, model(batch)).values())


def test_lists_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="two objectives are called 'direct'"):
        build_objectives([OBJECTIVES["direct"].Config(teacher=name) for name in ("a", "b")], SCHEMA, TASKS, 4)
    with pytest.raises(ConfigError, match="traffic 'feed' is not in the schema; known: all"):
        build_objectives(configs("supervised", traffics=("feed",)), SCHEMA, TASKS, 4)


# --- what is served


def train(model: Model, own: list[Any], steps: int = 3) -> nn.ModuleList:
    """A few steps on the model's objectives."""
    torch.manual_seed(1)
    objectives = nn.ModuleList(build_objectives(own, SCHEMA, TASKS, model.representation_dim))
    optimizer = torch.optim.Adam([*model.parameters(), *objectives.parameters()], lr=0.01)
    for step in range(steps):
        batch = random_batch(seed=step, considerations=0.3)
        optimizer.zero_grad()
        output = model(batch)
        terms = [term for part in objectives for term in part(batch, output).values()]
        torch.stack([term.coefficient * term.weighted_sum / len(batch) for term in terms]).sum().backward()
        optimizer.step()
    return objectives


def cost(served: ServedModel) -> tuple[int, int]:
    """Parameters, and floating point operations of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        served(random_batch())
    return sum(parameter.numel() for parameter in served.parameters()), counter.get_total_flops()


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("model", ["fm", "dcnv2"])
def test_new_objectives_leave_no_trace(kind: str, model: str) -> None:
    plain, distilled = small_model(model), small_model(model)
    train(plain, [])
    objectives = train(distilled, configs(kind))
    one, other = (export_model(small_config(model), SCHEMA, TASKS, m.state_dict()) for m in (plain, distilled))
    shapes = {name: value.shape for name, value in one.state_dict().items()}
    assert {name: value.shape for name, value in other.state_dict().items()} == shapes
    assert cost(other) == cost(one)
    # What is served is the main head as it was trained, and it did learn from the objective.
    batch = random_batch(seed=9)
    assert max_difference(distilled, other, batch) == {"click": 0.0, "watch": 0.0}
    if kind != "supervised":
        assert max_difference(plain, other, batch)["click"] > 1e-4
        owned = {id(p) for p in objectives.parameters()}
        assert not owned & {id(p) for p in distilled.parameters()}
