from __future__ import annotations

import pytest
import torch
from model_batches import SCHEMA, SIZES, TASKS, max_difference, random_batch, small_config, small_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rayfm.config import SnapshotError
from rayfm.distill import OBJECTIVES
from rayfm.export.calibrator import Calibrator
from rayfm.export.served import ServedModel, export_model
from rayfm.models import Model


def exported(kind: str, tensors: dict[str, torch.Tensor]) -> ServedModel:
    return export_model(small_config(kind), SCHEMA, TASKS, tensors)


def train(model: Model, kinds: tuple[str, ...], steps: int = 3) -> None:
    """A few steps on the tasks' own loss and on the named objectives, adapters first."""
    torch.manual_seed(1)
    objectives = nn.ModuleList(
        OBJECTIVES["supervised"](OBJECTIVES["supervised"].Config(), SCHEMA, TASKS, 0) for _ in (1,)
    )
    for kind in kinds:
        part = OBJECTIVES[kind]
        objectives.append(part(part.Config(teacher="fm"), SCHEMA, TASKS, model.representation_dim))
    adapters = [parameter for part in objectives for parameter in part.pre_step_parameters()]
    ahead = torch.optim.Adam(adapters) if adapters else None
    others = [p for p in [*model.parameters(), *objectives.parameters()] if not any(p is a for a in adapters)]
    optimizer = torch.optim.Adam(others, lr=0.01)
    for step in range(steps):
        batch = random_batch(seed=step)
        if ahead is not None:
            ahead.zero_grad()
            terms = [term for part in objectives for term in (part.pre_step(batch) or {}).values()]
            torch.stack([term.weighted_sum for term in terms]).sum().backward()
            ahead.step()
        optimizer.zero_grad()
        output = model(batch)
        terms = [term for part in objectives for term in part(batch, output).values()]
        torch.stack([term.coefficient * term.weighted_sum / len(batch) for term in terms]).sum().backward()
        optimizer.step()


def cost(served: ServedModel) -> tuple[int, int]:
    """Parameters, and floating point operations of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        served(random_batch())
    return sum(parameter.numel() for parameter in served.parameters()), counter.get_total_flops()


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_objectives_leave_no_trace(kind: str) -> None:
    plain, distilled = small_model(kind), small_model(kind)
    train(plain, ())
    train(distilled, ("auxiliary_head", "student_adapter"))
    one, other = exported(kind, plain.state_dict()), exported(kind, distilled.state_dict())
    shapes = {name: value.shape for name, value in one.state_dict().items()}
    assert {name: value.shape for name, value in other.state_dict().items()} == shapes
    assert cost(other) == cost(one)
    assert kind == "fm" or cost(one)[1] > 0  # an FM has no matrix product with one row a table; others count theirs
    # They did learn from it, though.
    assert max_difference(plain, other, random_batch(seed=9))["click"] > 1e-4


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_an_exported_model_predicts_what_the_trained_one_does(kind: str) -> None:
    model = small_model(kind)
    train(model, ("direct",))
    served = exported(kind, model.state_dict())
    batch = random_batch(seed=5)
    predictions = served(batch)
    logits = model(batch).logits
    torch.testing.assert_close(predictions["click"], torch.sigmoid(logits["click"]), rtol=0, atol=0)
    torch.testing.assert_close(predictions["watch"], logits["watch"], rtol=0, atol=0)
    assert max_difference(model, served, batch) == {"click": 0.0, "watch": 0.0}
    assert not served.training
    assert not any(parameter.requires_grad for parameter in served.parameters())
    assert not any(value.is_meta for value in served.state_dict().values())


def test_max_difference_sees_a_changed_weight() -> None:
    model = small_model("dcnv2")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    served = exported("dcnv2", tensors)
    tensors["heads.linear.bias"] += torch.tensor([0.4, 0.5])
    difference = max_difference(model, served, random_batch())
    assert difference["watch"] == pytest.approx(0.5, abs=1e-6)
    assert 0.05 < difference["click"] <= 0.1


def test_tables_are_not_copied() -> None:
    tensors = dict(small_model("dlrm").state_dict())
    served = exported("dlrm", tensors)
    for name, value in served.model.state_dict().items():
        assert value.data_ptr() == tensors[name].data_ptr(), name


def test_a_calibrator_travels_with_the_tensors() -> None:
    model, batch = small_model("dlrm"), random_batch()
    calibrator = Calibrator(SCHEMA, TASKS)
    logit = torch.randn(500)
    calibrator.fit("click", logit, (logit + torch.randn(500) > 1).float())
    tensors = ServedModel(model, calibrator).tensors()
    assert {name for name in tensors if name.startswith("calibrator.")} == {
        "calibrator.click.scale",
        "calibrator.click.shift",
    }
    served = exported("dlrm", tensors)
    plain = exported("dlrm", dict(model.state_dict()))
    assert plain.calibrator is None
    z = torch.logit(plain(batch)["click"].double())
    expected = torch.sigmoid(tensors["calibrator.click.scale"] * z + tensors["calibrator.click.shift"])
    torch.testing.assert_close(served(batch)["click"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(served(batch)["watch"], plain(batch)["watch"])
    assert max_difference(model, served, batch)["click"] == 0


def test_foreign_tensors_are_refused() -> None:
    tensors = dict(small_model("fm").state_dict())
    with pytest.raises(SnapshotError, match=r"lacks 'heads\.bias_T'; load it"):
        exported("fm", {name: value for name, value in tensors.items() if name != "heads.bias_T"})
    with pytest.raises(SnapshotError, match=r"has 'objectives\.0\.x', which the model has not"):
        exported("fm", {**tensors, "objectives.0.x": torch.zeros(1)})
    with pytest.raises(SnapshotError, match=r"tensor 'heads.bias_T' is torch.float32 \[3\] in the snapshot"):
        exported("fm", {**tensors, "heads.bias_T": torch.zeros(3)})
    with pytest.raises(SnapshotError, match=r"is torch\.float64"):
        exported("fm", {**tensors, "heads.bias_T": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(SnapshotError, match=r"lacks 'click\.shift'"):
        exported("fm", {**tensors, "calibrator.click.scale": torch.ones(())})
