"""A teacher's history as an input of every model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_batches import SIZES, random_batch, small_config, small_model

from rayfm.config import ConfigError
from rayfm.data.batch import Batch
from rayfm.models.histories import HistoryEmbeddings, HistoryFeature

WIDTH = 6
KEY = "user"
HISTORY = HistoryFeature(teacher="big", key=KEY, width=WIDTH)


def with_history(batch: Batch, values: torch.Tensor, known: torch.Tensor, name: str = HISTORY.name) -> Batch:
    return dataclasses.replace(
        batch,
        representation=values,
        representation_mask=known.unsqueeze(1),
        representation_widths=((name, values.shape[1]),),
    )


def test_the_vector_is_the_projected_direction_and_a_learned_one_where_there_is_none():
    histories = HistoryEmbeddings((HISTORY,), 2, init_std=0.01)
    with torch.no_grad():
        histories.projections_ER[0].copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0]]))
        histories.absent_VE.copy_(torch.tensor([[7.0, 8.0]]))
    values = torch.tensor([[3.0, 4, 0, 0, 0, 0], [30.0, 40, 0, 0, 0, 0], [1.0, 1, 1, 1, 1, 1]])
    batch = with_history(random_batch(3), values, torch.tensor([True, True, False]))
    # rms of (3, 4, 0, 0, 0, 0) is 5 / sqrt(6): a tenfold length changes nothing.
    root = 6**0.5
    expected = torch.tensor([[3 / 5 * root, 2 * 4 / 5 * root], [3 / 5 * root, 2 * 4 / 5 * root], [7.0, 8.0]])
    torch.testing.assert_close(histories(batch)[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert histories(random_batch(3))[:, 0].tolist() == [[7.0, 8.0]] * 3  # a batch without any


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_every_model_reads_it(kind: str):
    model = small_model(kind, histories=(HISTORY,))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "histories" in name:
            torch.nn.init.normal_(parameter)
    batch = random_batch(16)
    values = torch.randn(16, WIDTH)
    known = torch.arange(16) % 4 != 0
    outputs = [model.eval()(with_history(batch, v, known)).logits["click"] for v in (values, -values)]
    changed = (outputs[0] - outputs[1]).abs() > 1e-6
    assert changed[known].all()
    assert not changed[~known].any()
    model.train()(with_history(batch, values, known)).logits["click"].sum().backward()
    projections = [p for name, p in model.named_parameters() if "projections_ER" in name]
    assert projections
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projections)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_without_one_a_model_is_what_it_was(kind: str):
    names = set(dict(small_model(kind).named_parameters()))
    assert not any("histor" in name for name in names)
    assert names < set(dict(small_model(kind, histories=(HISTORY,)).named_parameters()))


def test_the_two_towers_read_it_on_the_side_of_its_key():
    torch.manual_seed(0)
    for key, moved in ((KEY, (True, False)), ("video", (False, True))):
        history = HistoryFeature(teacher="big", key=key, width=WIDTH)
        model = small_model("two_tower", histories=(history,)).eval()
        for name, parameter in model.named_parameters():
            if "histories" in name:
                torch.nn.init.normal_(parameter)
        batch, values, known = random_batch(4), torch.randn(4, WIDTH), torch.ones(4, dtype=torch.bool)
        one = model.vectors(with_history(batch, values, known, history.name))
        other = model.vectors(with_history(batch, -values, known, history.name))
        assert tuple(bool((a != b).any()) for a, b in zip(one, other, strict=True)) == moved


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"key": "usr"}, "history/big/usr: key 'usr' is no sparse feature; did you mean 'user'?"),
        ({"positives_of": "clik"}, "history/big/user: positives_of 'clik' is no binary task; did you mean 'click'?"),
        ({"width": None}, "history/big/user: how wide is the representation of 'big'? set 'width'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, expected):
    with pytest.raises(ConfigError) as raised:
        small_model("fm", histories=(HISTORY.model_copy(update=changes),))
    assert expected in str(raised.value)


def test_one_history_twice_is_refused():
    with pytest.raises(ValueError, match="history 'history/big/user' stands twice"):
        small_config("fm", histories=(HISTORY, HISTORY.model_copy(update={"decay": 0.5})))
