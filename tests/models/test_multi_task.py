"""Heads over a shared representation: dependent towers and mixtures of experts."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_batches import SCHEMA, TASKS, random_batch, small_config, small_model
from pydantic import ValidationError
from small_pipeline import mapping, merged
from torch.nn import functional

from rayfm.config import ConfigError, validate
from rayfm.models import build_model, heads
from rayfm.models.heads import (
    MixtureOfExperts,
    MixtureOfExpertsConfig,
    SharedBottomConfig,
    TaskHeads,
    evaluation_order,
    mix_experts,
)
from rayfm.pipeline.config import PipelineConfig

SHARING = ("dlrm", "dcnv2", "deepfm")
"""Models whose tasks share a representation."""
CHOICES: tuple[dict[str, Any], ...] = (
    {"type": "shared", "depends_on": {"watch": "click"}},
    {"type": "mmoe", "experts": 3, "expert_hidden": (10, 7)},
    {"type": "mmoe", "experts": 2, "expert_hidden": (5,), "depends_on": {"watch": ("click",)}},
)


def test_a_mixture_is_the_sum_of_experts_by_their_gates() -> None:
    gates = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    experts = torch.tensor([[[4.0, 8.0], [0.0, 4.0]]])
    assert mix_experts(gates, experts).tolist() == [[[1.0, 5.0], [4.0, 8.0]]]


def test_gates_are_a_softmax_for_each_task() -> None:
    mixture = MixtureOfExperts(2, num_tasks=2, experts=2, hidden=(3,))
    with torch.no_grad():
        # Task 0 scores its experts (ln 3, 0) for x = (1, 0), task 1 (0, 0).
        mixture.gate.weight.copy_(torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [0.0, 5.0], [0.0, -5.0]]))
    gates = mixture.gates(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(gates, torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]))
    assert mixture.gate.bias is None


def test_experts_are_relu_layers_that_all_tasks_share() -> None:
    mixture, x = MixtureOfExperts(4, num_tasks=3, experts=2, hidden=(6, 5)), torch.randn(8, 4)
    outputs = []
    for expert in mixture.experts:
        first, second = expert.layers[0], expert.layers[2]
        outputs.append(
            functional.linear(functional.linear(x, first.weight, first.bias).relu(), second.weight, second.bias)
        )
    scores = (x @ mixture.gate.weight.T).view(8, 3, 2)
    weights = scores.exp() / scores.exp().sum(2, keepdim=True)
    for task in range(3):
        expected = sum(weights[:, task, [i]] * outputs[i].relu() for i in range(2))
        torch.testing.assert_close(mixture(x)[:, task], expected)


def test_each_task_reads_its_own_mixture() -> None:
    towers = TaskHeads(6, TASKS, (4,), MixtureOfExpertsConfig(experts=2, expert_hidden=(5,)))
    x = torch.randn(3, 6)
    mixed = towers.mixture(x)
    for position, task in enumerate(TASKS):
        torch.testing.assert_close(towers(x)[task], towers.towers[task](mixed[:, position]))
    towers(x)["click"].sum().backward()
    rows = towers.mixture.gate.weight.grad.view(2, 2, 6).abs().sum((1, 2))
    assert rows[0] > 0
    assert rows[1] == 0
    assert all(expert.layers[0].weight.grad.abs().sum() > 0 for expert in towers.mixture.experts)


def test_a_dependent_head_reads_the_logit_that_it_depends_on() -> None:
    towers = TaskHeads(2, ("buy", "click"), (), SharedBottomConfig(depends_on={"buy": "click"}))
    with torch.no_grad():
        for task, weight, bias in (("click", [1.0, 2.0], 0.5), ("buy", [0.0, 1.0, 10.0], -1.0)):
            towers.towers[task].output.weight.copy_(torch.tensor([weight]))
            towers.towers[task].output.bias.fill_(bias)
    logits = towers(torch.tensor([[1.0, 3.0]]))
    assert list(logits) == ["buy", "click"]
    assert logits["click"].item() == 1 + 2 * 3 + 0.5
    assert logits["buy"].item() == 3 + 10 * 7.5 - 1


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_into_the_logit_that_is_read_can_be_stopped(detach: bool) -> None:
    towers = TaskHeads(4, ("click", "buy"), (3,), SharedBottomConfig(depends_on={"buy": "click"}, detach=detach))
    representation = torch.randn(5, 4, requires_grad=True)
    logits = towers(representation)
    logits["buy"].sum().backward()
    gradient = towers.towers["click"].output.weight.grad
    assert (gradient is None) == detach
    assert towers.towers["buy"].hidden.layers[0].weight.grad[:, -1].abs().sum() > 0
    assert representation.grad.abs().sum() > 0


def test_a_chain_of_dependencies_is_evaluated_in_order() -> None:
    config = SharedBottomConfig(depends_on={"pay": ("buy", "click"), "buy": "click"})
    assert evaluation_order(("pay", "click", "buy"), config) == ("click", "buy", "pay")
    towers = TaskHeads(4, ("pay", "click", "buy"), (), config)
    assert towers.towers["pay"].output.in_features == 6
    x = torch.randn(3, 4)
    logits = towers(x)
    read = torch.stack([logits["buy"], logits["click"]], dim=1)
    torch.testing.assert_close(logits["pay"], towers.towers["pay"](torch.cat([x, read], dim=1)))


def test_offsets_are_part_of_the_logit_that_is_read() -> None:
    towers = TaskHeads(4, TASKS, (), SharedBottomConfig(depends_on={"watch": "click"}))
    x, offsets = torch.randn(3, 4), {"click": torch.tensor([1.0, 2.0, 3.0]), "watch": torch.zeros(3)}
    plain, shifted = towers(x), towers(x, offsets)
    torch.testing.assert_close(shifted["click"], plain["click"] + offsets["click"])
    slope = towers.towers["watch"].output.weight[0, -1]
    torch.testing.assert_close(shifted["watch"], plain["watch"] + slope * offsets["click"])


def test_by_default_nothing_lies_between_representation_and_heads() -> None:
    assert TaskHeads(6, TASKS).state_dict().keys() == {"linear.weight", "linear.bias"}
    names = TaskHeads(6, TASKS, (5,)).state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"towers"}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_model_with_a_shared_representation(kind: str, choice: dict[str, Any]) -> None:
    model, batch = small_model(kind, multi_task=choice, head=(6,)), random_batch()
    plain = small_model(kind)
    output = model(batch)
    assert output.representation.shape == (32, plain.representation_dim)
    assert list(output.logits) == list(TASKS)
    # The representation is the layer below the experts: the same layers, the same seed.
    torch.testing.assert_close(output.representation, plain(batch).representation)
    sum(logit.square().sum() for logit in output.logits.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    for task in TASKS:
        assert rounded.logits[task].dtype == torch.float32
        torch.testing.assert_close(rounded.logits[task], output.logits[task], rtol=0.05, atol=0.02)
    with torch.device("meta"):
        nothing = build_model(model.config, SCHEMA, TASKS)
    owners = [module for module in nothing.modules() if list(module.parameters(recurse=False))]
    assert all(hasattr(owner, "reset_parameters") for owner in owners)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_rank_without_rows_takes_part(choice: dict[str, Any]) -> None:
    model = small_model("dlrm", multi_task=choice)
    logits = model(random_batch(0)).logits
    assert all(logit.shape == (0,) for logit in logits.values())
    sum(logit.sum() for logit in logits.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.heads.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="in a circle"):
        SharedBottomConfig(depends_on={"a": "b", "b": ("c",), "c": "a"})
    with pytest.raises(ValidationError, match="in a circle"):
        SharedBottomConfig(depends_on={"a": "a"})
    with pytest.raises(ConfigError, match="'clik' is not a task of the model; did you mean 'click'"):
        build_model(small_config("dlrm", multi_task={"type": "shared", "depends_on": {"watch": "clik"}}), SCHEMA, TASKS)
    with pytest.raises(ConfigError, match="'watch' is not a task of the model"):
        build_model(
            small_config("dlrm", multi_task={"type": "shared", "depends_on": {"watch": "click"}}), SCHEMA, ("click",)
        )
    for given, complaint in (
        ({"type": "shared", "experts": 2}, "unknown key 'multi_task.experts'"),
        ({"type": "mmoe", "expert": 2}, "did you mean 'experts'"),
        ({"type": "moe"}, "'multi_task.type': unknown 'moe'; did you mean 'mmoe'"),
        ({"experts": 2}, "'multi_task': needs a 'type' key"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            validate(type(small_config("dlrm")), {"multi_task": given})


def test_a_pipeline_refuses_an_unknown_task_before_anything_is_built(tmp_path: Path) -> None:
    sharing = {"type": "shared", "depends_on": {"click": "watch"}}
    changes = {"students": {"vm": {"model": {"type": "dcnv2", "multi_task": sharing}}}}
    with pytest.raises(ConfigError, match=r"vm: multi_task\.depends_on: 'watch' is not a task of the model"):
        validate(PipelineConfig, merged(mapping(tmp_path), changes))


def test_the_config_survives_a_dump() -> None:
    config = small_config("dlrm", multi_task=CHOICES[2], head=(3,))
    assert type(config).model_validate(config.dump()) == config


def test_the_example_runs() -> None:
    result = doctest.testmod(heads)
    assert (result.attempted > 0, result.failed) == (True, 0)
