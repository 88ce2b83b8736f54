from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import pytest
import torch
from model_batches import SCHEMA, SUPERVISION, TASKS, random_batch, small_model
from torch import Tensor

from rayfm.config import Config, ConfigError, validate
from rayfm.data.batch import CONSIDERATION, Batch
from rayfm.distill import OBJECTIVES, Objective, ObjectiveConfig, Term
from rayfm.distill.losses import binary_cross_entropy, squared_error
from rayfm.distill.scaling import scale_gradient, scale_label
from rayfm.distill.student_adapter import Adapter
from rayfm.models import ModelOutput

DISTILLING = ("direct", "auxiliary_head", "student_adapter")
H = 6


def objective(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    part = OBJECTIVES[kind]
    base = {} if kind == "supervised" else {"teacher": "fm"}
    return part(part.Config(**{**base, **changes}), SCHEMA, TASKS, H)


def output_for(batch: Batch, seed: int = 0) -> ModelOutput:
    generator = torch.Generator().manual_seed(seed)
    representation = torch.randn(len(batch), H, generator=generator, requires_grad=True)
    logits = {task: torch.randn(len(batch), generator=generator, requires_grad=True) for task in TASKS}
    return ModelOutput(representation, logits)


def mixed_batch(rows: int = 40, seed: int = 0) -> Batch:
    """Labelled and unlabelled rows, with and without supervision, with different weights."""
    batch = random_batch(rows, seed=seed, considerations=0.4, coverage=0.7)
    return dataclasses.replace(batch, weight=torch.linspace(0.5, 2.0, rows))


def backward(terms: dict[str, Term]) -> None:
    torch.stack([term.coefficient * term.weighted_sum for term in terms.values()]).sum().backward()


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """A slice of what objectives read."""
    cut = {
        name: getattr(batch, name)[start:stop]
        for name in ("labels", "label_mask", "supervision", "supervision_mask", "kind", "weight", "example_id")
    }
    return dataclasses.replace(batch, sparse=None, weighted=None, sequence=None, **cut)


# --- equations by hand


def test_equation_1_by_hand() -> None:
    z, y = torch.tensor([0.0, 2.0, -1.5]), torch.tensor([1.0, 0.3, 0.0])
    expected = []
    for logit, label in zip(z.tolist(), y.tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        expected.append(-(label * math.log(p) + (1 - label) * math.log(1 - p)))
    torch.testing.assert_close(binary_cross_entropy(z, y), torch.tensor(expected))
    assert expected[0] == pytest.approx(math.log(2))
    torch.testing.assert_close(squared_error(z, y), torch.tensor([1.0, 2.89, 2.25]))


def test_equation_1_is_finite_far_out() -> None:
    loss = binary_cross_entropy(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(loss, torch.tensor([200.0, 200.0]))


def small_case() -> tuple[Batch, ModelOutput]:
    """Three rows: an impression, an impression without supervision, a consideration."""
    batch = dataclasses.replace(
        rows_of(random_batch(3), 0, 3),
        labels=torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]]),
        label_mask=torch.tensor([[True, True], [True, False], [False, False]]),
        supervision=torch.tensor([[0.4, 1.5], [0.0, 0.0], [0.8, 0.5]]),
        supervision_mask=torch.tensor([[True, True], [False, False], [True, True]]),
        kind=torch.tensor([0, 0, CONSIDERATION]),
        weight=torch.tensor([1.0, 2.0, 4.0]),
    )
    logits = {"click": torch.tensor([0.5, -1.0, 1.0]), "watch": torch.tensor([1.0, 3.0, 0.0])}
    return batch, ModelOutput(torch.randn(3, H), logits)


def h(logit: float, label: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -(label * math.log(p) + (1 - label) * math.log(1 - p))


def test_supervised_by_hand() -> None:
    batch, output = small_case()
    terms = objective("supervised")(batch, output)
    assert terms["click"].weighted_sum.item() == pytest.approx(h(0.5, 1) + 2 * h(-1.0, 0))
    assert terms["click"].weight.item() == 3
    assert terms["click"].coefficient == 2  # the task's weight
    assert terms["watch"].weighted_sum.item() == pytest.approx(1.0)
    assert terms["watch"].weight.item() == 1
    assert terms["watch"].coefficient == 1


def test_direct_is_equation_2_by_hand() -> None:
    batch, output = small_case()
    terms = objective("direct", weight=0.7)(batch, output)
    assert terms["click"].weighted_sum.item() == pytest.approx(h(0.5, 0.4) + 4 * h(1.0, 0.8))
    assert terms["click"].weight.item() == 5
    assert terms["click"].coefficient == 0.7
    assert terms["watch"].weighted_sum.item() == pytest.approx((1.0 - 1.5) ** 2 + 4 * 0.5**2)


def test_auxiliary_head_is_equation_4_with_scaled_labels_by_hand() -> None:
    batch, output = small_case()
    auxiliary = objective("auxiliary_head", label_scale=2.0, weight=3.0, hidden=())
    terms = auxiliary(batch, output)
    logit = auxiliary.heads["click"](output.representation)
    # 2 * 0.4 stays, 2 * 0.8 is clipped to 1.
    expected = h(logit[0].item(), 0.8) - 4 * math.log(torch.sigmoid(logit[2]).item())
    assert terms["click"].weighted_sum.item() == pytest.approx(expected, rel=1e-5)
    assert terms["click"].coefficient == 3.0
    # A regression's target is not scaled.
    value = auxiliary.heads["watch"](output.representation)
    expected = (value[0].item() - 1.5) ** 2 + 4 * (value[2].item() - 0.5) ** 2
    assert terms["watch"].weighted_sum.item() == pytest.approx(expected, rel=1e-5)


def test_student_adapter_is_equations_6_and_7_by_hand() -> None:
    batch, output = small_case()
    adapter = objective("student_adapter", hidden=())
    with torch.no_grad():
        for parameter in adapter.adapters.parameters():
            parameter.normal_(std=0.5)
    module = adapter.adapters["click"].correction
    adapted = []
    for p in (0.4, 0.8):
        z = math.log(p / (1 - p))
        hidden = torch.relu(module.hidden.layers[0].weight[:, 0] * z + module.hidden.layers[0].bias)
        adapted.append(z + (module.output.weight[0] @ hidden + module.output.bias[0]).item())
    # Eq. 6: only the first row has both a label and supervision.
    before = adapter.pre_step(batch)
    assert before["adapter/click"].weighted_sum.item() == pytest.approx(h(adapted[0], 1.0), rel=1e-5)
    assert before["adapter/click"].weight.item() == 1
    # Eq. 7: the unlabelled row learns from the adapted label too.
    terms = adapter(batch, output)
    logit = adapter.heads["click"](output.representation)
    labels = [1 / (1 + math.exp(-z)) for z in adapted]
    expected = h(logit[0].item(), labels[0]) + 4 * h(logit[2].item(), labels[1])
    assert terms["adapted/click"].weighted_sum.item() == pytest.approx(expected, rel=1e-5)
    assert terms["adapted/click"].weight.item() == 5


# --- scalings


def test_labels_are_clipped() -> None:
    labels = torch.tensor([0.0, 0.2, 0.5, 0.9])
    torch.testing.assert_close(scale_label(labels, 2.0), torch.tensor([0.0, 0.4, 1.0, 1.0]))
    assert torch.equal(scale_label(labels, 1.0), labels)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 8.0])
def test_gradient_scaling_is_exact_and_leaves_the_value(beta: float) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(5, 3)
    scaled = scale_gradient(x, beta)
    assert torch.equal(scaled, x)
    (scaled * weight).sum().backward()
    assert torch.equal(x.grad, beta * weight)


@pytest.mark.parametrize("kind", ["auxiliary_head", "student_adapter"])
def test_beta_scales_the_backbones_gradient_and_not_the_heads(kind: str) -> None:
    batch = mixed_batch()
    gradients = {}
    for beta in (1.0, 4.0):
        part, output = objective(kind, gradient_scale=beta), output_for(batch)
        backward(part(batch, output))
        gradients[beta] = output.representation.grad, [p.grad for p in part.heads.parameters()]
    assert torch.equal(gradients[4.0][0], 4 * gradients[1.0][0])  # a power of two: exact
    for one, four in zip(gradients[1.0][1], gradients[4.0][1], strict=True):
        assert torch.equal(one, four)


# --- who learns from what


def test_direct_reaches_the_serving_head_and_auxiliary_heads_do_not() -> None:
    batch = random_batch(coverage=0.8)
    for kind in DISTILLING:
        model = small_model("dcnv2")
        part = OBJECTIVES[kind](OBJECTIVES[kind].Config(teacher="fm"), SCHEMA, TASKS, model.representation_dim)
        backward(part(batch, model(batch)))
        serving = [p.grad for p in model.heads.parameters()]
        assert all((g is not None and g.abs().sum() > 0) == (kind == "direct") for g in serving)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.deep.parameters())


def test_stop_gradient_of_the_adapter() -> None:
    batch = mixed_batch()
    adapter, output = objective("student_adapter"), output_for(batch)
    learners = adapter.pre_step_parameters()
    assert {id(p) for p in learners} == {id(p) for p in adapter.adapters.parameters()}

    backward(adapter(batch, output))
    assert all(parameter.grad is None for parameter in learners)
    assert output.representation.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.heads.parameters())
    assert all(logit.grad is None for logit in output.logits.values())

    adapter.zero_grad(set_to_none=True)
    with torch.no_grad():  # away from the start, where the hidden layer has no gradient yet
        for parameter in learners:
            parameter.normal_()
    backward(adapter.pre_step(batch))
    assert all(parameter.grad.abs().sum() > 0 for parameter in learners)
    assert all(parameter.grad is None for parameter in adapter.heads.parameters())


def test_other_objectives_have_no_pre_step() -> None:
    for kind in ("supervised", "direct", "auxiliary_head"):
        assert objective(kind).pre_step(mixed_batch()) is None
        assert objective(kind).pre_step_parameters() == []


def test_adapter_starts_as_the_identity_and_learns_a_shift() -> None:
    z = torch.linspace(-6, 3, 4000)
    adapter = Adapter((16,))
    torch.testing.assert_close(adapter(z), z)
    # The teacher has become too high by 1 on the logit: the adapter finds it from labels alone.
    torch.manual_seed(0)
    label = torch.bernoulli(torch.sigmoid(z - 1))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        binary_cross_entropy(adapter(z), label).mean().backward()
        optimizer.step()
    calibration = torch.sigmoid(adapter(z)).mean() / label.mean()
    assert calibration.item() == pytest.approx(1, abs=0.02)
    assert (torch.sigmoid(z).mean() / label.mean()).item() > 1.3


def test_adapter_survives_certain_teachers() -> None:
    batch = mixed_batch()
    batch.supervision[:, 0] = (batch.supervision[:, 0] > 0.5).float()
    adapter = objective("student_adapter")
    terms = [*adapter.pre_step(batch).values(), *adapter(batch, output_for(batch)).values()]
    assert all(torch.isfinite(term.weighted_sum) for term in terms)


def test_adapter_is_exact_under_autocast() -> None:
    adapter = Adapter((16,))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    z = torch.randn(50)
    with torch.autocast("cpu", torch.bfloat16):
        inside = adapter(z)
    assert torch.equal(inside, adapter(z))


# --- rows


@pytest.mark.parametrize("kind", DISTILLING)
@pytest.mark.parametrize("rows", ["all", "impressions", "considerations", "unlabelled"])
def test_rows_that_are_distilled(kind: str, rows: str) -> None:
    batch = mixed_batch()
    batch.label_mask[:4, 0] = False  # impressions whose window has not closed
    keep: Tensor = {
        "all": torch.ones(40, dtype=torch.bool),
        "impressions": batch.kind != CONSIDERATION,
        "considerations": batch.kind == CONSIDERATION,
        "unlabelled": ~batch.label_mask[:, 0],
    }[rows]
    expected = (batch.weight * batch.supervision_mask[:, 0] * keep).sum()
    term = next(iter(objective(kind, rows=rows)(batch, output_for(batch)).values()))
    torch.testing.assert_close(term.weight, expected)
    assert term.weight > 0


@pytest.mark.parametrize("kind", DISTILLING)
def test_rows_without_supervision_do_not_count(kind: str) -> None:
    batch = mixed_batch()
    part, output = objective(kind), output_for(batch)
    terms = part(batch, output)
    other = dataclasses.replace(batch, supervision=batch.supervision + 0.3 * ~batch.supervision_mask)
    for name, term in part(other, output).items():
        torch.testing.assert_close(term.weighted_sum, terms[name].weighted_sum, rtol=0, atol=0)


@pytest.mark.parametrize("kind", DISTILLING)
def test_no_supervision_at_all_is_zero_over_zero(kind: str) -> None:
    batch = random_batch(coverage=0.0)
    output = output_for(batch)
    terms = objective(kind)(batch, output)
    assert all(term.weighted_sum.item() == 0 and term.weight.item() == 0 for term in terms.values())
    backward(terms)
    leaf = output.logits["click"] if kind == "direct" else output.representation
    assert leaf.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["supervised", *DISTILLING])
def test_halves_add_up_to_the_whole(kind: str) -> None:
    batch = mixed_batch()
    part = objective(kind)
    output = output_for(batch)

    def terms_of(start: int, stop: int) -> dict[str, Term]:
        rows = rows_of(batch, start, stop)
        cut = ModelOutput(output.representation[start:stop], {t: z[start:stop] for t, z in output.logits.items()})
        return part(rows, cut) | (part.pre_step(rows) or {})

    whole, first, second = terms_of(0, 40), terms_of(0, 13), terms_of(13, 40)
    for name, term in whole.items():
        torch.testing.assert_close(first[name].weighted_sum + second[name].weighted_sum, term.weighted_sum)
        torch.testing.assert_close(first[name].weight + second[name].weight, term.weight)
    assert whole


# --- configs


def test_supervision_columns() -> None:
    assert objective("supervised").config.supervision(TASKS) == ()
    for kind in DISTILLING:
        assert objective(kind).config.supervision(TASKS) == SUPERVISION
        assert objective(kind, tasks=("click",)).config.supervision(TASKS) == ("fm/click",)


def test_a_head_may_distil_a_task_that_the_student_lacks() -> None:
    part = OBJECTIVES["auxiliary_head"]
    config = part.Config(teacher="fm", tasks=("click", "watch"))
    auxiliary: Objective = part(config, SCHEMA, ("click",), H)
    assert set(auxiliary(mixed_batch(), output_for(mixed_batch()))) == {"click", "watch"}
    with pytest.raises(ConfigError, match="'direct': it cannot distil task 'watch'"):
        OBJECTIVES["direct"](OBJECTIVES["direct"].Config(teacher="fm", tasks=("watch",)), SCHEMA, ("click",), H)
    with pytest.raises(ConfigError, match="did you mean 'click'"):
        part(part.Config(teacher="fm", tasks=("clik",)), SCHEMA, TASKS, H)
    with pytest.raises(ConfigError, match="twice"):
        part(part.Config(teacher="fm", tasks=("click", "click")), SCHEMA, TASKS, H)


def test_objectives_are_chosen_in_a_config_file() -> None:
    class Holder(Config):
        objectives: tuple[Annotated[ObjectiveConfig, OBJECTIVES], ...]

    held = validate(
        Holder,
        {
            "objectives": [
                {"type": "auxiliary_head", "teacher": "fm", "weight": 2.0},
                {"type": "student_adapter", "teacher": "fm"},
            ]
        },
    )
    assert [type(config) for config in held.objectives] == [
        OBJECTIVES["auxiliary_head"].Config,
        OBJECTIVES["student_adapter"].Config,
    ]
    with pytest.raises(ConfigError, match="did you mean 'label_scale'"):
        validate(Holder, {"objectives": [{"type": "auxiliary_head", "teacher": "fm", "label_scal": 2.0}]})
    with pytest.raises(ConfigError, match="did you mean 'auxiliary_head'"):
        validate(Holder, {"objectives": [{"type": "auxilary_head", "teacher": "fm"}]})
