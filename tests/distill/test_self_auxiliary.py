"""SEAD: selectors, the auxiliary head on own predictions, the signal-loss teacher and student."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_batches import small_model
from objective_cases import SURFACES, backward, five_rows, h, objective, part_of, sigmoid
from pydantic import ValidationError

from rayfm.config import ConfigError
from rayfm.distill import OBJECTIVES
from rayfm.distill.losses import binary_cross_entropy
from rayfm.distill.selector import Curriculum, LabelSelector, mix_labels, select_label
from rayfm.models.synthetic import synthetic_batch

Y = torch.tensor([1.0, 1.0, 0.0, 0.0])
PREDICTION = torch.tensor([0.9, 0.2, 0.7, 0.1])
CLICK = {"tasks": ("click",)}


# --- selectors


@pytest.mark.parametrize(
    ("branch", "expected", "factor"),
    [
        ("max", [1.0, 1.0, 0.7, 0.1], [1, 1, 1, 1]),
        ("min", [0.9, 0.2, 0.0, 0.0], [1, 1, 1, 1]),
        ("original", [1.0, 1.0, 0.0, 0.0], [1, 1, 1, 1]),
        ("distilled", [0.9, 0.2, 0.7, 0.1], [1, 1, 1, 1]),
        ("positives", [1.0, 1.0, 0.0, 0.0], [1, 1, 0, 0]),
    ],
)
def test_selectors(branch: str, expected: list[float], factor: list[float]) -> None:
    label, weight = select_label(branch, Y, PREDICTION)
    assert label.tolist() == pytest.approx(expected)
    assert weight.tolist() == factor


def test_a_mixture_of_selectors_has_the_mixed_loss() -> None:
    z = torch.tensor([0.3, -0.4, 1.2, 2.0])
    for first, last in (("original", "distilled"), ("positives", "max")):
        one, other = select_label(first, Y, PREDICTION), select_label(last, Y, PREDICTION)
        label, weight = mix_labels(one, other, 0.25)
        expected = sum(
            share * factor * binary_cross_entropy(z, target) for share, (target, factor) in ((0.75, one), (0.25, other))
        )
        torch.testing.assert_close(weight * binary_cross_entropy(z, label), expected)
    assert torch.isfinite(mix_labels(one, one, 0.5)[0]).all()  # rows of weight 0 have a label too


def test_a_curriculum_counts_training_steps_alone() -> None:
    selector = LabelSelector("curriculum", Curriculum(steps=4, positive_weight=5.0))
    known = torch.ones(4, dtype=torch.bool)

    def now() -> list[float]:
        label, weight = selector(Y, known, PREDICTION, known)
        assert label.tolist() == pytest.approx([1.0, 1.0, 0.7, 0.1])
        return weight.tolist()

    seen = []
    for _ in range(6):
        seen.append(now()[0])
        assert now()[2] == 1.0
        selector.advance()
    assert seen == [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    selector.eval()
    selector.advance()
    assert int(selector.step) == 6
    assert set(selector.state_dict()) == {"step"}
    assert LabelSelector("max").state_dict() == {}


def test_a_curriculum_goes_from_one_selector_to_another() -> None:
    selector = LabelSelector("curriculum", Curriculum(steps=2, positive_weight=1.0, first="original", last="distilled"))
    known = torch.ones(4, dtype=torch.bool)
    for expected in (Y, (Y + PREDICTION) / 2, PREDICTION, PREDICTION):
        torch.testing.assert_close(selector(Y, known, PREDICTION, known)[0], expected)
        selector.advance()


def test_a_resumed_curriculum_goes_on() -> None:
    selector = LabelSelector("curriculum", Curriculum(steps=10))
    for _ in range(3):
        selector.advance()
    resumed = LabelSelector("curriculum", Curriculum(steps=10))
    resumed.load_state_dict(selector.state_dict())
    assert resumed.progress().item() == pytest.approx(0.3)


# --- the auxiliary head


def own(output, row: int) -> float:
    return sigmoid(output.logits["click"][row].item())


@pytest.mark.parametrize("selector", ["max", "min", "original", "distilled", "positives", "curriculum"])
def test_the_auxiliary_head_by_hand(selector: str) -> None:
    batch, output = five_rows()
    config = {"curriculum": Curriculum(steps=10, positive_weight=3.0)} if selector == "curriculum" else {}
    part = objective("self_auxiliary", **CLICK, selector=selector, hidden=(), weight=0.2, **config)
    z = part.heads["click"](output.representation).tolist()
    rows = {  # (weight, label) of rows 0 to 4; rows 3 and 4 have no label
        "max": [(1, 1.0), (2, own(output, 1)), (3, own(output, 2))],
        "min": [(1, own(output, 0)), (2, 0.0), (3, 0.0)],
        "original": [(1, 1.0), (2, 0.0), (3, 0.0)],
        "distilled": [(weight, own(output, row)) for row, weight in enumerate((1, 2, 3, 4, 5))],
        "positives": [(1, 1.0)],
        "curriculum": [(3, 1.0), (2, own(output, 1)), (3, own(output, 2))],
    }[selector]
    term = part(batch, output)["click"]
    expected = sum(weight * h(z[row], label) for row, (weight, label) in enumerate(rows))
    assert term.weighted_sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.weight.item() == sum(weight for weight, _ in rows)
    assert term.coefficient == 0.2


@pytest.mark.parametrize("selector", ["max", "min", "distilled", "curriculum"])
def test_the_serving_head_teaches_and_gets_no_gradient(selector: str) -> None:
    batch, output = five_rows()
    part = objective("self_auxiliary", **CLICK, selector=selector)
    backward(part(batch, output))
    assert all(z.grad is None for z in output.logits.values())
    assert output.representation.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in part.heads.parameters())


def test_sga_stops_the_gradient_into_everything_shared() -> None:
    batch = synthetic_batch(SURFACES, 32, seed=0)
    for scale in (0.0, 1.0):
        model = small_model("dcnv2")
        part = OBJECTIVES["self_auxiliary"]
        auxiliary = part(part.Config(**CLICK, gradient_scale=scale), SURFACES, ("click",), model.representation_dim)
        backward(auxiliary(batch, model(batch)))
        shared = [p.grad for p in model.parameters() if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in shared) == (scale == 1.0)
        assert all(p.grad.abs().sum() > 0 for p in auxiliary.heads.parameters())
        assert all(p.grad is None for p in model.heads.parameters())


def test_a_signal_loss_teacher_learns_each_traffic_by_its_own_head() -> None:
    batch, output = five_rows()
    main = objective("supervised", traffics=("feed",))
    auxiliary = objective("self_auxiliary", **CLICK, selector="original", traffics=("search",), hidden=())
    terms = main(batch, output)
    assert terms["click"].weighted_sum.item() == pytest.approx(h(0.5, 1) + 3 * h(1.5, 0), rel=1e-6)
    assert (terms["click"].weight.item(), terms["watch"].weight.item()) == (1 + 3, 1)
    assert terms["click"].coefficient == 2
    backward(terms)
    assert (output.logits["click"].grad != 0).tolist() == [True, False, True, False, False]
    z = auxiliary.heads["click"](output.representation)[1].item()
    term = auxiliary(batch, output)["click"]
    assert term.weighted_sum.item() == pytest.approx(2 * h(z, 0), rel=1e-5)
    assert term.weight.item() == 2


# --- the serving head on selected labels


def test_a_signal_loss_student_by_hand() -> None:
    batch, output = five_rows()
    batch.supervision[0, 0] = 0.4
    term = objective("selected_label", **CLICK, teacher="fm", weight=0.5)(batch, output)["click"]
    # max(1, .4), max(0, .3); row 2 has no prediction: its label; rows 3 and 4 have no label.
    expected = 1 * h(0.5, 1.0) + 2 * h(-1.0, 0.3) + 3 * h(1.5, 0.0)
    assert term.weighted_sum.item() == pytest.approx(expected, rel=1e-6)
    assert term.weight.item() == 6
    assert term.coefficient == 0.5 * 2
    backward({"click": term})
    assert (output.logits["click"].grad != 0).tolist() == [True, True, True, False, False]


def test_labels_are_selected_on_some_traffics_alone() -> None:
    batch, output = five_rows()
    term = objective("selected_label", **CLICK, teacher="fm", selector="distilled", traffics=("search",))(batch, output)
    # feed: rows 0 and 2 learn their labels, row 4 has none; search: rows 1 and 3 learn the prediction.
    expected = 1 * h(0.5, 1.0) + 2 * h(-1.0, 0.3) + 3 * h(1.5, 0.0) + 4 * h(0.2, 0.6)
    assert term["click"].weighted_sum.item() == pytest.approx(expected, rel=1e-6)
    assert term["click"].weight.item() == 10


def test_distilled_labels_fall_back_on_the_true_ones() -> None:
    batch, output = five_rows()
    term = objective("selected_label", **CLICK, teacher="fm", selector="distilled", rows="impressions")(batch, output)
    expected = 1 * h(0.5, 0.4) + 2 * h(-1.0, 0.3) + 3 * h(1.5, 0.0) + 4 * h(0.2, 0.6)
    assert term["click"].weighted_sum.item() == pytest.approx(expected, rel=1e-6)


def test_the_teachers_prediction_is_a_constant_and_the_step_counts() -> None:
    batch, output = five_rows()
    part = objective("selected_label", **CLICK, teacher="fm", selector="curriculum", curriculum={"steps": 2})
    assert part(batch, output)["click"].weight.item() == 4 * 1 + 2 + 3
    assert part(batch, output)["click"].weight.item() == 2.5 * 1 + 2 + 3
    assert part(batch, output)["click"].weight.item() == 1 + 2 + 3


# --- sums, rows, errors


CASES = [
    ("supervised", {"traffics": ("feed",)}),
    ("cross_stage", {"next_stage": "logged/next", "fallback": "fm"}),
    ("dependent_task", {"teacher": "fm"}),
    ("auxiliary_task", {"teacher": "fm"}),
    ("self_auxiliary", {**CLICK, "selector": "curriculum"}),
    ("selected_label", {**CLICK, "teacher": "fm"}),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=[kind for kind, _ in CASES])
def test_the_sums_of_two_ranks_are_those_of_one(kind: str, config: dict) -> None:
    batch, output = five_rows()
    whole = objective(kind, **config)(batch, output)
    parts = [objective(kind, **config)(*part_of(batch, output, *bounds)) for bounds in ((0, 2), (2, 5), (5, 5))]
    for name, term in whole.items():
        torch.testing.assert_close(sum(part[name].weighted_sum for part in parts), term.weighted_sum)
        torch.testing.assert_close(sum(part[name].weight for part in parts), term.weight)
        assert parts[2][name].weight.item() == 0
    assert whole


@pytest.mark.parametrize(("kind", "config"), CASES, ids=[kind for kind, _ in CASES])
def test_what_is_masked_does_not_count(kind: str, config: dict) -> None:
    batch, output = five_rows()
    terms = objective(kind, **config)(batch, output)
    other = dataclasses.replace(
        batch,
        supervision=torch.where(batch.supervision_mask, batch.supervision, 0.77),
        labels=torch.where(batch.label_mask, batch.labels, 1.0),
    )
    for name, term in objective(kind, **config)(other, output).items():
        assert torch.equal(term.weighted_sum, terms[name].weighted_sum)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("self_auxiliary", {"rows": "considerations"}, "selector 'max' needs true labels, and rows 'considerations'"),
        ("self_auxiliary", {"rows": "unlabelled", "selector": "curriculum"}, "selector 'curriculum' needs true labels"),
        ("self_auxiliary", {"curriculum": {}}, "the selector is 'max'; remove 'curriculum'"),
        ("selected_label", {"teacher": "fm", "rows": "unlabelled"}, "selector 'max' needs true labels"),
        (
            "selected_label",
            {"teacher": "fm", "rows": "considerations", "selector": "distilled"},
            "rows 'considerations': the term takes the place of the tasks' own loss",
        ),
        ("selected_label", {"teacher": "fm", "selector": "positives"}, "'max', 'min', 'distilled' or 'curriculum'"),
        ("selected_label", {}, "teacher"),
    ],
)
def test_configs_that_cannot_be_meant(kind: str, config: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OBJECTIVES[kind].Config(**config)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("supervised", {"traffics": ("fed",)}, "'supervised': traffic 'fed' is not in the schema; did you mean 'feed'"),
        ("supervised", {"tasks": ("clik",)}, "'supervised': the model has no task 'clik'; did you mean 'click'"),
        ("self_auxiliary", {**CLICK, "traffics": ("x",)}, "'self_auxiliary': traffic 'x' is not in the schema"),
        ("self_auxiliary", {}, "'self_auxiliary': task 'watch' is a regression, and a selector chooses"),
        ("self_auxiliary", {"tasks": ("clik",)}, "'self_auxiliary': it cannot distil task 'clik'"),
        ("selected_label", {"teacher": "fm", "name": "mine"}, "'mine': task 'watch' is a regression"),
        ("selected_label", {**CLICK, "teacher": "fm", "traffics": ("serch",)}, "did you mean 'search'"),
    ],
)
def test_what_does_not_fit_the_schema_is_known_before_training(kind: str, config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES[kind].Config(**config).check(SURFACES, ("click", "watch"))
