"""The student's representation drawn to the teacher's stored one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from model_batches import SCHEMA, TASKS, random_batch, small_model

from rayfm.config import ConfigError
from rayfm.data.batch import CONSIDERATION, Batch
from rayfm.distill import OBJECTIVES
from rayfm.distill.representation import cosine_distance, l2_distance
from rayfm.models import ModelOutput

PART = OBJECTIVES["representation"]
H, R = 3, 2


def objective(**changes: Any) -> Any:
    torch.manual_seed(0)
    return PART(PART.Config(**{"teacher": "fm", "width": R, **changes}), SCHEMA, TASKS, H)


def batch_of(teacher: torch.Tensor, mask: list[bool], **changes: Any) -> Batch:
    rows, width = teacher.shape
    return dataclasses.replace(
        random_batch(rows),
        representation=torch.cat([torch.full((rows, 1), 9.0), teacher], 1),
        representation_mask=torch.tensor([[False, known] for known in mask]),
        representation_widths=(("other", 1), ("fm", width)),
        **changes,
    )


def test_distances_by_hand() -> None:
    projected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 4.0], [-4.0, 3.0], [1.0, 1.0]])
    torch.testing.assert_close(l2_distance(projected, teacher), torch.tensor([2.5, 25.0, 1.0]))
    expected = torch.tensor([1 - 8 / (math.sqrt(5) * 4), 1.0, 1.0])
    torch.testing.assert_close(cosine_distance(projected, teacher), expected)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_the_term_by_hand(distance: str) -> None:
    part = objective(distance=distance, weight=0.2)
    teacher = torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.3, 0.3], [1.0, 1.0]])
    batch = batch_of(teacher, [True, True, False, True], weight=torch.tensor([1.0, 2.0, 4.0, 8.0]))
    x = torch.randn(4, H, generator=torch.Generator().manual_seed(1))
    ((name, term),) = part(batch, ModelOutput(x, {})).items()
    projected = x @ part.projection.weight.T + part.projection.bias
    distances = {
        "l2": ((projected - teacher) ** 2).sum(1) / R,
        "cosine": 1 - (projected * teacher).sum(1) / (projected.norm(dim=1) * teacher.norm(dim=1)),
    }[distance]
    assert name == distance
    torch.testing.assert_close(term.weighted_sum, distances[0] + 2 * distances[1] + 8 * distances[3])
    assert term.weight.item() == 11
    assert term.coefficient == 0.2


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_gradients_reach_the_backbone_and_the_projection_alone(distance: str) -> None:
    model = small_model("dcnv2")
    part = PART(PART.Config(teacher="fm", width=R, distance=distance), SCHEMA, TASKS, model.representation_dim)
    stored = torch.randn(32, R, generator=torch.Generator().manual_seed(2)).requires_grad_()
    known = (torch.arange(32) % 3 > 0).tolist()
    batch = batch_of(stored.detach(), known)
    output = model(batch)
    output.representation.retain_grad()
    part(batch, output)[distance].weighted_sum.backward()
    assert all(p.grad.abs().sum() > 0 for p in part.projection.parameters())
    assert all(p.grad is None for p in model.heads.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.deep.parameters())
    gradient = output.representation.grad.abs().sum(1)
    assert (gradient[~torch.tensor(known)] == 0).all(), "a row without a stored one teaches nothing"
    assert torch.isfinite(gradient).all()


def test_gradient_scale_acts_on_the_backbone_alone() -> None:
    batch = batch_of(torch.randn(5, R), [True] * 5)
    gradients = {}
    for scale in (1.0, 4.0):
        part, x = objective(gradient_scale=scale), torch.ones(5, H, requires_grad=True)
        part(batch, ModelOutput(x, {}))["l2"].weighted_sum.backward()
        gradients[scale] = x.grad, part.projection.weight.grad
    assert torch.equal(gradients[4.0][0], 4 * gradients[1.0][0])
    assert torch.equal(gradients[4.0][1], gradients[1.0][1])


def test_rows() -> None:
    kind = torch.tensor([0, CONSIDERATION, 0, CONSIDERATION])
    batch = batch_of(torch.randn(4, R), [True, True, False, True], kind=kind, weight=torch.tensor([1.0, 2.0, 4.0, 8.0]))
    x = ModelOutput(torch.randn(4, H), {})
    names = ("all", "impressions", "considerations")
    weights = {rows: objective(rows=rows)(batch, x)["l2"].weight.item() for rows in names}
    assert weights == {"all": 11, "impressions": 1, "considerations": 10}


def test_a_period_without_labels_is_zero_over_zero() -> None:
    part, x = objective(distance="cosine"), torch.randn(4, H, requires_grad=True)
    term = part(batch_of(torch.zeros(4, R), [False] * 4), ModelOutput(x, {}))["cosine"]
    assert (term.weighted_sum.item(), term.weight.item()) == (0, 0)
    term.weighted_sum.backward()
    assert x.grad.abs().sum() == 0


def test_the_projection_learns_a_rotated_teacher() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, H, generator=generator)
    teacher = x @ torch.randn(H, R, generator=generator) + 1.5
    part, batch = objective(), batch_of(teacher, [True] * 500)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        term = part(batch, ModelOutput(x, {}))["l2"]
        (term.weighted_sum / term.weight).backward()
        optimizer.step()
        losses.append(term.weighted_sum.item() / term.weight.item())
    assert losses[-1] < 0.001 * losses[0]


def test_the_width_comes_from_the_teacher() -> None:
    config = PART.Config(teacher="fm")
    assert config.representations() == {"fm": None}
    assert config.supervision(TASKS) == ()
    told = config.with_widths({"fm": 7, "other": 3})
    assert told.representations() == {"fm": 7}
    assert PART.Config(teacher="fm", width=5).with_widths({"fm": 7}).representations() == {"fm": 5}
    assert PART(told, SCHEMA, TASKS, H).projection.weight.shape == (7, H)
    with pytest.raises(ConfigError, match=r"how wide is the representation of 'fm'.*set 'width'"):
        PART(config, SCHEMA, TASKS, H)
    assert OBJECTIVES["direct"].Config(teacher="fm").representations() == {}
