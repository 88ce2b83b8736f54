"""UKDSL: cross-stage distillation (section 4.1.1), dependent and auxiliary task (section 4.3)."""

from __future__ import annotations

import pytest
import torch
from objective_cases import backward, five_rows, h, objective
from pydantic import ValidationError

from rayfm.config import ConfigError
from rayfm.distill.cross_stage import first_prediction, rows_by_source

NEXT = {"next_stage": "logged/next"}
BOTH = {**NEXT, "fallback": "fm"}


def test_the_logged_prediction_comes_first_and_the_teacher_fills_its_gaps() -> None:
    batch, _ = five_rows()
    value, found = first_prediction(batch, ("logged/next", "fm"), "click")
    torch.testing.assert_close(value, torch.tensor([0.9, 0.3, 0.0, 0.6, 0.7]))
    assert found.tolist() == [True, True, False, True, True]
    value, found = first_prediction(batch, ("fm", "logged/next"), "click")
    torch.testing.assert_close(value, torch.tensor([0.4, 0.3, 0.0, 0.6, 0.8]))
    value, found = first_prediction(batch, ("logged/next",), "click")
    assert found.tolist() == [True, False, False, False, True]


def test_cross_stage_by_hand() -> None:
    batch, output = five_rows()
    terms = objective("cross_stage", **BOTH, weight=0.5)(batch, output)
    expected = 1 * h(0.5, 0.9) + 2 * h(-1.0, 0.3) + 4 * h(0.2, 0.6) + 5 * h(1.0, 0.7)
    assert terms["click"].weighted_sum.item() == pytest.approx(expected, rel=1e-6)
    assert terms["click"].weight.item() == 12
    assert terms["click"].coefficient == 0.5
    watch = 1 * (1.0 - 1.0) ** 2 + 4 * (-1.0 - 0.5) ** 2 + 5 * (0.5 - 2.0) ** 2
    assert terms["watch"].weighted_sum.item() == pytest.approx(watch, rel=1e-6)


def test_predictions_instead_of_labels_leave_the_label_where_there_is_none() -> None:
    batch, output = five_rows()
    terms = objective("cross_stage", **NEXT, tasks=("click",), replace_labels=True, weight=0.5)(batch, output)
    # Rows 1 and 2 have a label and no logged prediction; row 3 has neither.
    expected = 1 * h(0.5, 0.9) + 2 * h(-1.0, 0.0) + 3 * h(1.5, 0.0) + 5 * h(1.0, 0.7)
    assert terms["click"].weighted_sum.item() == pytest.approx(expected, rel=1e-6)
    assert terms["click"].weight.item() == 11
    assert terms["click"].coefficient == 0.5 * 2  # the task's weight is 2


@pytest.mark.parametrize(("rows", "weight"), [("impressions", 1 + 2 + 4), ("considerations", 5), ("unlabelled", 4 + 5)])
def test_impressions_and_considerations_apart(rows: str, weight: float) -> None:
    batch, output = five_rows()
    assert objective("cross_stage", **BOTH, rows=rows)(batch, output)["click"].weight.item() == weight


def test_cross_stage_teaches_the_serving_head() -> None:
    batch, output = five_rows()
    backward(objective("cross_stage", **BOTH, tasks=("click",))(batch, output))
    labels, weights = [0.9, 0.3, 0.0, 0.6, 0.7], [1.0, 2.0, 0.0, 4.0, 5.0]
    expected = torch.tensor(weights) * (output.logits["click"].detach().sigmoid() - torch.tensor(labels))
    torch.testing.assert_close(output.logits["click"].grad, expected)


def test_cross_stage_columns_and_what_it_replaces() -> None:
    config = objective("cross_stage", **BOTH, tasks=("click",)).config
    assert config.supervision(("click", "watch")) == ("logged/next/click", "fm/click")
    assert config.replaces_supervised(("click", "watch")) == ()
    replacing = objective("cross_stage", **BOTH, tasks=("click",), replace_labels=True).config
    assert replacing.replaces_supervised(("click", "watch")) == ("click",)


def test_cross_stage_refuses_what_cannot_be_meant() -> None:
    with pytest.raises(ValidationError, match="fallback is next_stage itself, 'logged/next'"):
        objective("cross_stage", next_stage="logged/next", fallback="logged/next")
    with pytest.raises(ValidationError, match="with replace_labels and rows 'considerations' nothing would learn"):
        objective("cross_stage", **NEXT, rows="considerations", replace_labels=True)
    with pytest.raises(ConfigError, match="'cross_stage': it cannot distil task 'clik'; did you mean 'click'"):
        objective("cross_stage", **NEXT, tasks=("clik",))


def test_the_metrics_say_which_source_the_predictions_are_from() -> None:
    batch, output = five_rows()
    terms = objective("cross_stage", **BOTH, tasks=("click",))(batch, output)
    # Of weights 1, 2, 3, 4, 5: rows 0 and 4 are logged, the teacher fills 1 and 3, row 2 has neither.
    logged, filled = terms["click/coverage logged/next"], terms["click/coverage fm"]
    assert logged.weighted_sum.item() / logged.weight.item() == pytest.approx((1 + 5) / 15)
    assert filled.weighted_sum.item() / filled.weight.item() == pytest.approx((2 + 4) / 15)
    assert logged.coefficient == filled.coefficient == 0.0, "they are no part of the loss"
    assert set(terms) == {"click", "click/coverage logged/next", "click/coverage fm"}
    considered = objective("cross_stage", **BOTH, tasks=("click",), rows="considerations")(batch, output)
    assert considered["click/coverage logged/next"].weight.item() == 5
    assert considered["click/coverage fm"].weighted_sum.item() == 0
    assert set(objective("cross_stage", **NEXT, tasks=("click",))(batch, output)) == {"click"}, "one source says all"


def test_each_row_is_counted_at_one_source() -> None:
    batch, _ = five_rows()
    first, second = rows_by_source(batch, ("logged/next", "fm"), "click")
    assert first.tolist() == [True, False, False, False, True]
    assert second.tolist() == [False, True, False, True, False]


# --- SSLFM


@pytest.mark.parametrize("kind", ["dependent_task", "auxiliary_task"])
def test_sslfm_learns_on_unlabelled_rows_alone(kind: str) -> None:
    batch, output = five_rows()
    part = objective(kind, teacher="fm", weight=0.3)
    terms = part(batch, output)
    assert terms["click"].weight.item() == 4 + 5
    assert terms["click"].coefficient == 0.3
    backward(terms)
    changed = output.logits["click"] if kind == "dependent_task" else output.representation
    rows = changed.grad.abs().reshape(5, -1).sum(1) > 0
    # Row 2 has no label of watch, and no supervision either.
    assert rows.tolist() == [False, False, False, True, True]
    with pytest.raises(ValidationError, match="unlabelled"):
        objective(kind, teacher="fm", rows="all")


def test_the_dependent_task_starts_as_the_identity_of_the_serving_logit() -> None:
    batch, output = five_rows()
    term = objective("dependent_task", teacher="fm")(batch, output)["click"]
    assert term.weighted_sum.item() == pytest.approx(4 * h(0.2, 0.6) + 5 * h(1.0, 0.8), rel=1e-6)


def test_the_dependent_task_by_hand() -> None:
    batch, output = five_rows()
    part = objective("dependent_task", teacher="fm", tasks=("click",), hidden=(2,))
    correction = part.heads["click"].correction
    with torch.no_grad():
        correction.hidden.layers[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        correction.hidden.layers[0].bias.copy_(torch.tensor([0.5, 0.3]))
        correction.output.weight.copy_(torch.tensor([[0.2, 0.4]]))
        correction.output.bias.fill_(-0.1)
    # z = 0.2: 0.2 + 0.2 * 0.7 + 0.4 * 0.1 - 0.1; z = 1: 1 + 0.2 * 1.5 + 0 - 0.1
    term = part(batch, output)["click"]
    assert term.weighted_sum.item() == pytest.approx(4 * h(0.28, 0.6) + 5 * h(1.2, 0.8), rel=1e-6)


def test_who_learns_in_sslfm() -> None:
    batch, output = five_rows()
    dependent = objective("dependent_task", teacher="fm")
    backward(dependent(batch, output))
    assert output.representation.grad is None  # it reaches the backbone through the serving logit alone
    assert all(z.grad.abs().sum() > 0 for z in output.logits.values())
    assert all(head.correction.output.bias.grad.abs().sum() > 0 for head in dependent.heads.values())

    batch, output = five_rows()
    auxiliary = objective("auxiliary_task", teacher="fm")
    backward(auxiliary(batch, output))
    assert all(z.grad is None for z in output.logits.values())
    assert output.representation.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in auxiliary.heads.parameters())


def test_the_auxiliary_task_by_hand() -> None:
    batch, output = five_rows()
    part = objective("auxiliary_task", teacher="fm", hidden=())
    z = part.heads["click"](output.representation).tolist()
    term = part(batch, output)["click"]
    assert term.weighted_sum.item() == pytest.approx(4 * h(z[3], 0.6) + 5 * h(z[4], 0.8), rel=1e-5)


@pytest.mark.parametrize("kind", ["dependent_task", "auxiliary_task"])
def test_the_gradient_into_the_student_is_scaled(kind: str) -> None:
    gradients = {}
    for scale in (1.0, 0.25):
        batch, output = five_rows()
        part = objective(kind, teacher="fm", gradient_scale=scale)
        backward(part(batch, output))
        into = output.logits["click"] if kind == "dependent_task" else output.representation
        gradients[scale] = into.grad, [p.grad for p in part.heads.parameters()]
    assert torch.equal(gradients[0.25][0], 0.25 * gradients[1.0][0])
    for one, other in zip(gradients[1.0][1], gradients[0.25][1], strict=True):
        assert torch.equal(one, other)


def test_heads_for_tasks_that_the_student_lacks() -> None:
    batch, output = five_rows()
    assert set(objective("auxiliary_task", ("click",), teacher="fm", tasks=("watch",))(batch, output)) == {"watch"}
    with pytest.raises(ConfigError, match="'dependent_task': it cannot distil task 'watch'"):
        objective("dependent_task", ("click",), teacher="fm", tasks=("watch",))
