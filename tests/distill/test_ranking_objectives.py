"""Objectives of softened probabilities and of the order within a request: values, gradients, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from model_batches import SCHEMA, SUPERVISION, TASKS, random_batch, small_model
from torch import Tensor

from rayfm.config import ConfigError, DataError
from rayfm.data.batch import Batch
from rayfm.distill import OBJECTIVES
from rayfm.distill.base import check_names
from rayfm.distill.kl import softened_kl
from rayfm.distill.listwise import listnet, segment_log_softmax
from rayfm.distill.losses import binary_cross_entropy
from rayfm.distill.pairwise import hinge, ranknet
from rayfm.distill.requests import count_once, request_pairs, request_rows
from rayfm.models import ModelOutput

H = 6


def objective(kind: str, **changes: Any) -> Any:
    part = OBJECTIVES[kind]
    return part(part.Config(**{"teacher": "fm", "tasks": ("click",), **changes}), SCHEMA, TASKS, H)


def request_batch(
    teacher: list[float], group: list[int], weight: list[float] | None = None, mask: list[bool] | None = None
) -> Batch:
    rows = len(teacher)
    values = torch.tensor([teacher, teacher]).T.contiguous()
    known = torch.tensor(mask if mask is not None else [True] * rows)
    return dataclasses.replace(
        random_batch(rows),
        supervision=values,
        supervision_mask=torch.stack([known, known], 1),
        group=torch.tensor(group),
        weight=torch.tensor(weight if weight is not None else [1.0] * rows),
    )


def output_of(logit: list[float]) -> ModelOutput:
    z = torch.tensor(logit, requires_grad=True)
    return ModelOutput(torch.zeros(len(logit), H), {"click": z, "watch": torch.zeros(len(logit))})


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# --- softened probabilities


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_softened_kl_by_hand(temperature: float) -> None:
    pairs = [(0.0, 0.0), (1.5, -0.5), (-3.0, 2.0)]
    expected = []
    for z_s, z_t in pairs:
        p, q = sigmoid(z_s / temperature), sigmoid(z_t / temperature)
        expected.append(temperature**2 * (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))))
    z_s, z_t = torch.tensor(pairs).unbind(1)
    torch.testing.assert_close(softened_kl(z_s, z_t, temperature), torch.tensor(expected))
    assert expected[0] == 0


def test_softened_kl_has_the_gradient_of_the_softened_cross_entropy() -> None:
    z_t = torch.linspace(-4, 4, 9)
    for temperature in (1.0, 3.0):
        gradients = []
        for loss in (
            lambda z, t=temperature: softened_kl(z, z_t, t),
            lambda z, t=temperature: t**2 * binary_cross_entropy(z / t, torch.sigmoid(z_t / t)),
        ):
            z = torch.linspace(3, -2, 9, requires_grad=True)
            loss(z).sum().backward()
            gradients.append(z.grad)
        torch.testing.assert_close(*gradients)
        assert gradients[0].abs().max() > 0.1
    # T^2 (1 / T) (s(z_s / T) - s(z_t / T)) by hand.
    z = torch.tensor([1.0], requires_grad=True)
    softened_kl(z, torch.tensor([-1.0]), 2.0).backward()
    assert z.grad.item() == pytest.approx(2 * (sigmoid(0.5) - sigmoid(-0.5)))


def test_softened_kl_is_finite_far_out() -> None:
    z = torch.tensor([300.0, -300.0, 20.0], requires_grad=True)
    loss = softened_kl(z, torch.tensor([-300.0, 300.0, 20.0]), 1.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([300.0, 300.0, 0.0]))
    assert torch.isfinite(z.grad).all()


def test_the_kl_objective_by_hand() -> None:
    batch = request_batch([0.4, 0.9, 0.5], [-1, -1, -1], [1.0, 2.0, 4.0], [True, True, False])
    term = objective("kl", temperature=2.0, weight=0.3)(batch, output_of([1.0, 0.0, 5.0]))["click"]
    expected = 0.0
    for z, p, w in ((1.0, 0.4, 1.0), (0.0, 0.9, 2.0)):
        student, teacher = sigmoid(z / 2), sigmoid(logit(p) / 2)
        kl = teacher * math.log(teacher / student) + (1 - teacher) * math.log((1 - teacher) / (1 - student))
        expected += w * 4 * kl
    assert term.weighted_sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.weight.item() == 3
    assert term.coefficient == 0.3


def test_kl_at_temperature_1_differs_from_direct_by_the_teachers_entropy() -> None:
    batch = random_batch(50, coverage=0.8)
    output = output_of(torch.randn(50, generator=torch.Generator().manual_seed(1)).tolist())
    kl, direct = (
        objective(kind, **extra)(batch, output)["click"]
        for kind, extra in (("kl", {"temperature": 1.0}), ("direct", {}))
    )
    p, known = batch.supervised("fm/click")
    entropy = (torch.special.entr(p) + torch.special.entr(1 - p))[known].sum()
    torch.testing.assert_close(direct.weighted_sum - kl.weighted_sum, entropy)


def test_kl_refuses_a_regression() -> None:
    config = OBJECTIVES["kl"].Config(teacher="fm")
    with pytest.raises(ConfigError, match=r"'kl': task 'watch' is a regression.*name the binary tasks under 'tasks'"):
        config.check(SCHEMA, TASKS)
    with pytest.raises(ConfigError, match="'watch' is a regression"):
        OBJECTIVES["kl"](config, SCHEMA, TASKS, H)
    OBJECTIVES["kl"].Config(teacher="fm", tasks=("click",)).check(SCHEMA, TASKS)


# --- requests


def test_rows_that_can_be_compared() -> None:
    batch = request_batch([0.5] * 8, [7, -1, 3, 7, 9, 3, 3, -1], mask=[True] * 6 + [False, True])
    score = torch.arange(8.0, requires_grad=True)
    found = request_rows(batch, batch.supervision_mask[:, 0], score, score.detach() / 10)
    assert found.score_N.tolist() == [2, 5, 0, 3], "9 stands alone, -1 is no request, row 6 has no prediction"
    torch.testing.assert_close(found.teacher_N, torch.tensor([0.2, 0.5, 0.0, 0.3]))
    assert found.example_id_N.tolist() == batch.example_id[[2, 5, 0, 3]].tolist()
    assert found.request_N.tolist() == [0, 0, 1, 1]
    assert found.requests == 2
    assert found.own_N.all()
    found.score_N.sum().backward()
    assert score.grad.tolist() == [1, 0, 1, 1, 0, 1, 0, 0]


def test_ids_below_zero_are_requests_too() -> None:
    batch = request_batch([0.5] * 4, [-5, -5, -1, -1])
    found = request_rows(batch, torch.ones(4, dtype=torch.bool), torch.arange(4.0), torch.zeros(4))
    assert found.score_N.tolist() == [0, 1]


def test_every_pair_of_a_request_stands_once() -> None:
    sizes = [2, 5, 1, 9, 3]
    request = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    ids = torch.randperm(len(request), generator=torch.Generator().manual_seed(0)) * 1_000_003
    first, second = request_pairs(request, ids, at_most=100)
    found = {frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    expected = {
        frozenset(pair)
        for number in range(len(sizes))
        for pair in itertools.combinations((request == number).nonzero().squeeze(1).tolist(), 2)
    }
    assert found == expected
    assert len(first) == len(expected)


def test_pairs_are_bounded_and_follow_from_the_ids() -> None:
    ids = torch.arange(500)
    request = torch.zeros(500, dtype=torch.int64)
    first, second = request_pairs(request, ids, at_most=8)
    assert len(first) == 8 * 500 - 8 * 9 // 2
    assert torch.bincount(torch.cat([first, second]), minlength=500).max() <= 16
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    again = request_pairs(request, ids[shuffled], at_most=8)
    as_ids = [{frozenset(p) for p in zip(i[a].tolist(), i[b].tolist(), strict=True)} for i, (a, b) in (
        (ids, (first, second)),
        (ids[shuffled], again),
    )]  # fmt: skip
    assert as_ids[0] == as_ids[1]


def test_what_another_rank_counts_has_its_gradient_here() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    once = count_once(x**2, torch.tensor([True, False]))
    assert once.tolist() == [4, 0]
    once.sum().backward()
    assert x.grad.tolist() == [4, 6]


# --- pairwise


def test_the_losses_of_a_pair_by_hand() -> None:
    difference = torch.tensor([0.0, 2.0, -3.0])
    torch.testing.assert_close(ranknet(difference), torch.tensor([math.log(1 + math.exp(-d)) for d in (0, 2, -3)]))
    torch.testing.assert_close(hinge(difference, 1.5), torch.tensor([1.5, 0.0, 4.5]))


PAIRWISE_CASE = {
    "teacher": [0.9, 0.2, 0.6, 0.3, 0.3, 0.8, 0.7],
    "group": [4, 4, 4, 8, 8, -1, 2],
    "weight": [1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0],
}
"""Request 4 has three pairs; the teacher is undecided in 8; one row has no request, one is alone."""


@pytest.mark.parametrize("loss", ["ranknet", "hinge"])
def test_pairwise_by_hand(loss: str) -> None:
    z = [0.5, 1.0, -0.5, 3.0, 0.0, 9.0, 9.0]
    batch, output = request_batch(**PAIRWISE_CASE), output_of(z)
    term = objective("pairwise", loss=loss, margin=0.7, weight=2.0)(batch, output)["click"]
    pairs = [(0, 1, 2.0), (0, 2, 3.0), (2, 1, 6.0)]  # first belongs first; product of the weights
    one = {"ranknet": lambda d: math.log(1 + math.exp(-d)), "hinge": lambda d: max(0.0, 0.7 - d)}[loss]
    assert term.weighted_sum.item() == pytest.approx(sum(w * one(z[i] - z[j]) for i, j, w in pairs), rel=1e-5)
    assert term.weight.item() == 11
    assert term.coefficient == 2.0
    term.weighted_sum.backward()
    gradient = output.logits["click"].grad
    if loss == "ranknet":
        slope = {(i, j): -w * sigmoid(z[j] - z[i]) for i, j, w in pairs}
        expected = [
            sum(s for (i, _), s in slope.items() if i == row) - sum(s for (_, j), s in slope.items() if j == row)
            for row in range(7)
        ]
        torch.testing.assert_close(gradient, torch.tensor(expected))
    assert gradient[3:].abs().sum() == 0


# --- listwise


def test_a_softmax_by_segment() -> None:
    score = torch.tensor([1.0, 2.0, 100.0, -50.0, 0.5])
    segment = torch.tensor([0, 0, 1, 1, 2])
    found = segment_log_softmax(score, segment, 3)
    expected = torch.cat([torch.log_softmax(part, 0) for part in (score[:2], score[2:4], score[4:])])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_listnet_by_hand(temperature: float) -> None:
    score = torch.tensor([0.2, -1.0, 2.0, 0.0, 1.0], requires_grad=True)
    teacher = torch.tensor([1.0, 0.0, -1.0, 2.0, -2.0])
    segment = torch.tensor([0, 0, 0, 1, 1])
    loss = listnet(score, teacher, segment, 2, temperature)
    expected = []
    for part in (slice(0, 3), slice(3, 5)):
        t = [math.exp(x / temperature) for x in teacher[part].tolist()]
        s = [math.exp(x / temperature) for x in score[part].tolist()]
        expected.append(-(temperature**2) * sum(a / sum(t) * math.log(b / sum(s)) for a, b in zip(t, s, strict=True)))
    torch.testing.assert_close(loss, torch.tensor(expected))
    # The gradient is T (softmax(z / T) - softmax(t / T)).
    loss.sum().backward()
    gradient = torch.cat(
        [
            temperature * (torch.softmax(score[p] / temperature, 0) - torch.softmax(teacher[p] / temperature, 0))
            for p in (slice(0, 3), slice(3, 5))
        ]
    )
    torch.testing.assert_close(score.grad, gradient.detach())


def test_listwise_by_hand() -> None:
    z = [0.5, 1.0, -0.5, 3.0, 0.0, 9.0, 9.0]
    batch, output = request_batch(**PAIRWISE_CASE), output_of(z)
    term = objective("listwise", weight=0.5)(batch, output)["click"]
    expected = 0.0
    for rows, weight in (((0, 1, 2), 2.0), ((3, 4), 1.0)):  # the mean weight of each request's rows
        t = torch.softmax(torch.tensor([logit(PAIRWISE_CASE["teacher"][row]) for row in rows]), 0)
        s = torch.log_softmax(torch.tensor([z[row] for row in rows]), 0)
        expected -= weight * (t * s).sum().item()
    assert term.weighted_sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.weight.item() == 3
    assert term.coefficient == 0.5
    term.weighted_sum.backward()
    assert output.logits["click"].grad[5:].abs().sum() == 0
    assert output.logits["click"].grad[:5].abs().min() > 0


def test_listwise_of_a_regression_compares_values() -> None:
    batch = request_batch([3.0, 1.0], [5, 5])
    output = ModelOutput(torch.zeros(2, H), {"click": torch.zeros(2), "watch": torch.tensor([0.0, 2.0])})
    term = objective("listwise", tasks=("watch",))(batch, output)["watch"]
    share = math.exp(3) / (math.exp(3) + math.exp(1))
    normaliser = math.log(1 + math.exp(2))
    assert term.weighted_sum.item() == pytest.approx(share * normaliser + (1 - share) * (normaliser - 2), rel=1e-5)


# --- both


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_a_bias_of_a_whole_request_is_not_learned(kind: str) -> None:
    teacher = torch.tensor([0.6, 0.2, 0.5, 0.3])
    gradients = []
    for shift in (0.0, 1.0):
        moved = torch.sigmoid(torch.logit(teacher) + shift).tolist()
        output = output_of([0.3, -0.2, 0.0, 1.0])
        objective(kind)(request_batch(moved, [0, 0, 1, 1]), output)["click"].weighted_sum.backward()
        gradients.append(output.logits["click"].grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0.1


@pytest.mark.parametrize("kind", ["kl", "pairwise", "listwise"])
def test_the_order_of_the_rows_does_not_count(kind: str) -> None:
    rows = 60
    generator = torch.Generator().manual_seed(3)
    group = torch.randint(-1, 12, (rows,), generator=generator)
    batch = dataclasses.replace(random_batch(rows, coverage=0.8), group=group, weight=torch.linspace(0.5, 2, rows))
    z = torch.randn(rows, generator=generator)
    shuffled = torch.randperm(rows, generator=generator)
    fields = ("labels", "label_mask", "supervision", "supervision_mask", "kind", "weight", "example_id", "group")
    other = dataclasses.replace(batch, **{name: getattr(batch, name)[shuffled] for name in fields})
    one = objective(kind)(batch, output_of(z.tolist()))["click"]
    two = objective(kind)(other, output_of(z[shuffled].tolist()))["click"]
    torch.testing.assert_close(one.weighted_sum, two.weighted_sum)
    torch.testing.assert_close(one.weight, two.weight)
    assert one.weight > 0


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_batches_whose_requests_are_whole_add_up(kind: str) -> None:
    group = [0] * 7 + [1] * 5 + [2] * 8
    batch = request_batch(torch.rand(20, generator=torch.Generator().manual_seed(2)).tolist(), group)
    z = torch.randn(20, generator=torch.Generator().manual_seed(3))

    def term(rows: slice) -> Any:
        fields = ("labels", "label_mask", "supervision", "supervision_mask", "kind", "weight", "example_id", "group")
        part = dataclasses.replace(batch, **{name: getattr(batch, name)[rows] for name in fields})
        return objective(kind)(part, output_of(z[rows].tolist()))["click"]

    whole, first, second = term(slice(0, 20)), term(slice(0, 12)), term(slice(12, 20))
    torch.testing.assert_close(first.weighted_sum + second.weighted_sum, whole.weighted_sum)
    torch.testing.assert_close(first.weight + second.weight, whole.weight)


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_nothing_to_compare_is_zero_over_zero(kind: str) -> None:
    for group, mask in (([1, 2, 3], [True] * 3), ([1, 1, 1], [False] * 3)):
        output = output_of([0.1, 0.2, 0.3])
        term = objective(kind)(request_batch([0.5, 0.6, 0.7], group, mask=mask), output)["click"]
        assert (term.weighted_sum.item(), term.weight.item()) == (0.0, 0.0)
        term.weighted_sum.backward()  # DDP's static graph wants the same parameters in every step
        assert output.logits["click"].grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_a_log_without_requests_is_refused_at_the_first_batch(kind: str) -> None:
    part = objective(kind)
    assert part.config.needs_requests
    part(dataclasses.replace(random_batch(1), **_no_rows()), output_of([]))  # a rank may have none in a step
    with pytest.raises(DataError, match=f"'{kind}' compares rows of one request, but no row .* request_id"):
        part(random_batch(10), output_of([0.0] * 10))
    part = objective(kind)
    part(request_batch([0.5, 0.6], [1, 1]), output_of([0.0, 0.0]))
    part(random_batch(10), output_of([0.0] * 10))  # a batch of rows without requests among others


def _no_rows() -> dict[str, Tensor]:
    batch = random_batch(1)
    fields = ("labels", "label_mask", "supervision", "supervision_mask", "kind", "weight", "example_id", "group")
    return {name: getattr(batch, name)[:0] for name in fields}


@pytest.mark.parametrize("kind", ["kl", "pairwise", "listwise"])
def test_the_serving_head_learns(kind: str) -> None:
    model = small_model("dcnv2")
    batch = dataclasses.replace(random_batch(coverage=0.8), group=torch.arange(32) // 4)
    part = OBJECTIVES[kind](
        OBJECTIVES[kind].Config(teacher="fm", tasks=("click",)), SCHEMA, TASKS, model.representation_dim
    )
    part(batch, model(batch))["click"].weighted_sum.backward()
    # A softmax or a difference has no gradient to the head's bias.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.deep.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.heads.parameters())
    assert list(part.parameters()) == []


# --- configs


def test_what_does_not_fit_is_refused_before_training() -> None:
    for kind in ("direct", "pairwise", "listwise"):
        config = OBJECTIVES[kind].Config(teacher="fm", tasks=("watch",))
        assert config.supervision(TASKS) == ("fm/watch",)
        config.check(SCHEMA, TASKS)
        with pytest.raises(ConfigError, match="cannot distil task 'watch'"):
            config.check(SCHEMA, ("click",))
    auxiliary = OBJECTIVES["auxiliary_head"].Config(teacher="fm", tasks=("watch",))
    auxiliary.check(SCHEMA, ("click",))
    with pytest.raises(ConfigError, match="did you mean 'watch'"):
        OBJECTIVES["student_adapter"].Config(teacher="fm", tasks=("wach",)).check(SCHEMA, ("click",))
    assert OBJECTIVES["direct"].Config(teacher="fm").supervision(TASKS) == SUPERVISION


def test_two_objectives_need_two_names() -> None:
    head = OBJECTIVES["auxiliary_head"].Config
    check_names([head(teacher="a"), head(teacher="b", name="second"), OBJECTIVES["direct"].Config(teacher="a")])
    with pytest.raises(ConfigError, match="two objectives are called 'auxiliary_head'; give each a 'name'"):
        check_names([head(teacher="a"), head(teacher="b")])
    with pytest.raises(ConfigError, match="'second'"):
        check_names([head(teacher="a", name="second"), head(teacher="b", name="second")])
    with pytest.raises(ConfigError, match="'supervised'; the tasks' own loss has it"):
        check_names([OBJECTIVES["direct"].Config(teacher="a", name="supervised")])
    check_names([OBJECTIVES["supervised"].Config()])  # it takes the place of the default
