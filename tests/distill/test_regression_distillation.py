"""Distilling a noisy regression from an under-calibrated teacher (Khani et al. section 2, Table 1); choice of tasks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from model_batches import SCHEMA, TASKS, random_batch, small_model
from torch import Tensor, nn

from rayfm.distill import OBJECTIVES
from rayfm.models import ModelOutput

H, ROWS = 5, 4000
KINDS = ("direct", "auxiliary_head", "student_adapter")


def objective(kind: str, representation_dim: int = H, **changes: Any) -> Any:
    torch.manual_seed(0)
    part = OBJECTIVES[kind]
    base = {} if kind == "supervised" else {"teacher": "fm", "tasks": ("watch",)}
    return part(part.Config(**{**base, **changes}), SCHEMA, TASKS, representation_dim)


class Student(nn.Module):
    """A linear backbone that is too narrow for all of x, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.head = nn.Linear(8, H), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> ModelOutput:
        representation = self.backbone(x)
        value = self.head(representation).squeeze(1)
        return ModelOutput(representation, {"click": torch.zeros_like(value), "watch": value})


def train(*kinds: str) -> dict[str, float]:
    """RMSE against the expected value, and mean prediction over mean label, of a student of a teacher 30 % too low.

    The label is the expected value and much noise: the teacher knows the former up to its bias.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, 8, generator=generator)
    expected = 3 + x @ torch.linspace(0.2, 1.0, 8)
    label = expected + 6 * torch.randn(ROWS, generator=generator)
    batch = dataclasses.replace(
        random_batch(ROWS),
        labels=torch.stack([torch.zeros(ROWS), label], 1),
        supervision=torch.stack([torch.full((ROWS,), 0.5), 0.7 * expected], 1),
    )
    student = Student()
    parts = nn.ModuleList([objective("supervised"), *(objective(kind) for kind in kinds)])
    ahead = [p for part in parts for p in part.pre_step_parameters()]
    learned = [*student.parameters(), *(p for p in parts.parameters() if not any(p is q for q in ahead))]
    optimizer = torch.optim.Adam(learned, lr=0.03)
    adapters = torch.optim.Adam(ahead, lr=0.03) if ahead else None
    for _ in range(250):
        if adapters is not None:
            adapters.zero_grad()
            terms = [term for part in parts for term in (part.pre_step(batch) or {}).values()]
            torch.stack([t.weighted_sum / t.weight for t in terms]).sum().backward()
            adapters.step()
        optimizer.zero_grad()
        output = student(x)
        terms = [term for part in parts for name, term in part(batch, output).items() if "watch" in name]
        torch.stack([t.coefficient * t.weighted_sum / t.weight for t in terms]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        value = student(x).logits["watch"]
    found = {
        "rmse": float((value - expected).square().mean().sqrt()),
        "calibration": float(value.mean() / label.mean()),
    }
    for part in parts:
        if hasattr(part, "adapters"):
            adapted = part._adapt(SCHEMA.task("watch"), batch.supervised("fm/watch")[0])
            found["adapted"] = float(adapted.detach().mean() / label.mean())
    return found


def test_direct_distillation_passes_the_teachers_bias_on_and_an_auxiliary_head_does_not() -> None:
    none, direct, auxiliary = train(), train("direct"), train("auxiliary_head")
    assert none["calibration"] == pytest.approx(1, abs=0.02)
    assert direct["calibration"] == pytest.approx(0.85, abs=0.03), "half way to the teacher's 0.7"
    assert auxiliary["calibration"] == pytest.approx(1, abs=0.02)
    assert auxiliary["rmse"] < direct["rmse"]


def test_the_adapter_corrects_a_regressions_bias_from_labels() -> None:
    found = train("student_adapter")
    assert found["adapted"] == pytest.approx(1, abs=0.03), "the teacher's own is 0.7"
    assert found["calibration"] == pytest.approx(1, abs=0.02)


def test_the_adapter_of_a_regression_by_hand() -> None:
    part = objective("student_adapter", hidden=(), weight=0.4)
    with torch.no_grad():
        for parameter in part.adapters.parameters():
            parameter.normal_(std=0.5)
    teacher, label = torch.tensor([1.5, -0.5]), torch.tensor([2.0, 0.0])
    batch = dataclasses.replace(
        random_batch(2),
        labels=torch.stack([torch.zeros(2), label], 1),
        supervision=torch.stack([torch.zeros(2), teacher], 1),
        weight=torch.tensor([1.0, 3.0]),
    )
    module = part.adapters["watch"].correction
    hidden = torch.relu(teacher[:, None] @ module.hidden.layers[0].weight.T + module.hidden.layers[0].bias)
    adapted = teacher + (hidden @ module.output.weight[0] + module.output.bias[0])
    before = part.pre_step(batch)["adapter/watch"]
    torch.testing.assert_close(before.weighted_sum, (batch.weight * (adapted - label) ** 2).sum())
    output = ModelOutput(torch.randn(2, H), {})
    term = part(batch, output)["adapted/watch"]
    value = part.heads["watch"](output.representation)
    torch.testing.assert_close(term.weighted_sum, (batch.weight * (value - adapted.detach()) ** 2).sum())
    assert term.coefficient == 0.4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_only_the_tasks_named_are_distilled(kind: str, task: str) -> None:
    model = small_model("dcnv2")
    part = objective(kind, model.representation_dim, tasks=(task,))
    assert part.config.supervision(TASKS) == (f"fm/{task}",)
    batch = random_batch()
    terms = part(batch, model(batch))
    assert [name.rpartition("/")[2] for name in terms] == [task]
    other = dataclasses.replace(batch, supervision=batch.supervision.clone())
    other.supervision[:, 1 - TASKS.index(task)] += 1.0
    for name, term in part(other, model(batch)).items():
        assert torch.equal(term.weighted_sum, terms[name].weighted_sum), "the other task's predictions do not count"
    if kind == "direct":
        next(iter(terms.values())).weighted_sum.backward()
        gradient = model.heads.linear.weight.grad.abs().sum(1)
        assert (gradient > 0).tolist() == [name == task for name in TASKS]
