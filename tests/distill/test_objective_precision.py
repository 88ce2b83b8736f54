"""Under bfloat16 the heads' hidden layers round, and nothing else of an objective does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from objective_cases import five_rows, objective
from torch import nn

CASES: list[tuple[str, dict[str, Any]]] = [
    ("auxiliary_head", {"teacher": "fm", "hidden": (8,)}),
    ("student_adapter", {"teacher": "fm", "hidden": (8,)}),
    ("auxiliary_task", {"teacher": "fm", "hidden": (8,)}),
]


def bf16(on: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_hidden_layers_of_heads_round_and_losses_do_not(kind: str, config: dict[str, Any]) -> None:
    made = objective(kind, **config)
    widths: dict[str, torch.dtype] = {}
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, __, out, name=name: widths.__setitem__(name, out.dtype))
    sums = {}
    for on in (False, True):
        batch, output = five_rows()
        with bf16(on):
            sums[on] = made(batch, output)
        torch.stack([term.weighted_sum for term in sums[on].values()]).sum().backward()
        assert output.representation.grad is not None
        assert output.representation.grad.dtype == torch.float32
        hidden = {dtype for name, dtype in widths.items() if ".hidden." in name and "adapters" not in name}
        rest = {dtype for name, dtype in widths.items() if ".hidden." not in name or "adapters" in name}
        assert hidden == {torch.bfloat16 if on else torch.float32}
        assert rest == {torch.float32}
    for name, term in sums[True].items():
        assert term.weighted_sum.dtype == torch.float32
        assert term.weighted_sum.item() == pytest.approx(sums[False][name].weighted_sum.item(), rel=0.02)


def test_what_corrects_or_matches_a_teacher_does_not_round() -> None:
    batch, _ = five_rows()
    adapter = objective("student_adapter", teacher="fm", adapter=(16,))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    losses = []
    for on in (False, True):
        with bf16(on):
            losses.append(adapter.pre_step(batch)["adapter/click"].weighted_sum)
    assert torch.equal(*losses)
