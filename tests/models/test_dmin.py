from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from model_batches import SCHEMA, TASKS, random_batch, small_config, small_model
from pydantic import ValidationError
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import ConfigError
from rayfm.data.batch import Batch
from rayfm.models import build_model
from rayfm.models.attention import Attention, AttentionBlock, masked_softmax, rotate
from rayfm.models.dmin import DMIN, HeadLinear, InterestExtractor, TargetAttention
from rayfm.models.sequences import PaddedSequence

MASK = torch.tensor([[True, True, True, False], [False] * 4, [True] * 4])


def test_attention_computes_torchs() -> None:
    ours, theirs = Attention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        ours.query.weight.copy_(theirs.in_proj_weight[:8])
        ours.query.bias.normal_()
        theirs.in_proj_bias[:8].copy_(ours.query.bias)
        ours.key_value.weight.copy_(theirs.in_proj_weight[8:])
        theirs.in_proj_bias[8:].copy_(ours.key_value.bias)
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    queries, keys = torch.randn(3, 2, 8), torch.randn(3, 4, 8)
    expected, _ = theirs(queries, keys, keys, key_padding_mask=~MASK)
    found = ours(queries, keys, MASK)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert found.isfinite().all(), "nothing to attend to is no NaN"


def test_masked_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 9.0]] * 2)
    mask = torch.tensor([[True, True, False], [False] * 3])
    e = 2.718281828459045
    expected = torch.tensor([[1 / (1 + e), e / (1 + e), 0.0], [0.0] * 3])
    torch.testing.assert_close(masked_softmax(scores, mask), expected)
    torch.testing.assert_close(masked_softmax(scores.unsqueeze(1), mask)[:, 0], expected)


def test_rotary_products_depend_on_distance_alone() -> None:
    # One plane, base 1: position p turns by p radians.
    x = torch.tensor([[1.0, 0.0]] * 3).view(1, 1, 3, 2)
    turned = rotate(x, torch.arange(3), base=1.0)
    angles = torch.arange(3.0)
    torch.testing.assert_close(turned[0, 0], torch.stack([angles.cos(), angles.sin()], dim=1))
    query, key = torch.randn(1, 1, 1, 6), torch.randn(1, 1, 1, 6)
    products = [
        (rotate(query, torch.tensor([m])) * rotate(key, torch.tensor([n]))).sum().item() for m, n in ((5, 3), (9, 7))
    ]
    assert products[0] == pytest.approx(products[1], abs=1e-5)
    assert abs(products[0] - float((query * key).sum())) > 1e-4


def test_attention_blocks_see_no_padding() -> None:
    block = AttentionBlock(8, heads=2)
    x = torch.randn(3, 4, 8)
    out = block(x, MASK)
    assert not out[~MASK].any()
    changed = torch.where(MASK.unsqueeze(2), x, torch.randn(3, 4, 8))
    torch.testing.assert_close(block(changed, MASK), out)


@pytest.mark.parametrize(("heads", "rotary"), [(3, False), (4, True)])
def test_heads_that_do_not_divide_the_width(heads: int, rotary: bool) -> None:
    with pytest.raises(ValueError, match="is no multiple of"):
        Attention(8 if heads == 3 else 12, heads, rotary)


def test_each_head_has_its_own_linear_layer() -> None:
    layer, x = HeadLinear(2, 3, 4), torch.randn(5, 2, 6, 3)
    for head in range(2):
        torch.testing.assert_close(layer(x)[:, head], x[:, head] @ layer.weight_KIO[head] + layer.bias_KO[head])


def test_interests_are_heads_that_are_not_joined() -> None:
    extractor, x = InterestExtractor(4, 2), torch.randn(1, 3, 4)
    mask = torch.ones(1, 3, dtype=torch.bool)
    query, key, value = extractor.query_key_value(x)[0].split(4, dim=1)
    out = extractor(x, mask)
    assert out.shape == (1, 2, 3, 4)
    for head in range(2):
        part = slice(2 * head, 2 * head + 2)
        weights = torch.softmax(query[:, part] @ key[:, part].T / 2**0.5, dim=1)
        projected = weights @ value[:, part] @ extractor.project.weight_KIO[head] + extractor.project.bias_KO[head]
        normed = extractor.norm(x[0] + projected)
        first, _, second = extractor.feed_forward
        hidden = (normed @ first.weight_KIO[head] + first.bias_KO[head]).relu()
        expected = normed + hidden @ second.weight_KIO[head] + second.bias_KO[head]
        torch.testing.assert_close(out[0, head], expected)


def test_target_attention_is_a_weighted_average() -> None:
    config = DMIN.Config(embedding_dim=4)
    attention = TargetAttention(4, 3, 2, (5,), config)
    items, target = torch.randn(2, 1, 3, 4), torch.randn(2, 4)
    sequence = PaddedSequence(items[:, 0], torch.tensor([2, 0]))
    scores = []
    for place, age in ((0, 1), (1, 0)):
        item = items[0, 0, place]
        read = torch.cat([item, target[0], item * target[0], attention.positions.weight[age]])
        scores.append(attention.score(attention.mlp(read)))
    weights = torch.softmax(torch.cat(scores), dim=0)
    found = attention(items, target, sequence)
    torch.testing.assert_close(found[0, 0], weights @ items[0, 0, :2])
    assert not found[1].any()


def histories(lists: list[list[int]], rows: Batch) -> Batch:
    """``rows`` with these items watched, and none liked."""
    lengths = [len(items) for items in lists] + [0] * len(lists)
    ids = KeyedJaggedTensor(
        keys=["watched", "liked"],
        values=torch.tensor([item for items in lists for item in items], dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )
    return dataclasses.replace(rows, sequence=ids)


def test_order_and_target_matter_and_an_empty_history_is_fine() -> None:
    model = small_model("dmin")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    batch = random_batch(rows=1)
    logits = {
        tuple(items): model(histories([items], batch)).logits["click"].item()
        for items in ([3, 7, 9], [9, 7, 3], [3, 7, 8], [])
    }
    assert all(one != pytest.approx(other, abs=1e-4) for one, other in itertools.combinations(logits.values(), 2))
    # A longest history of another batch adds padding alone.
    two = dataclasses.replace(random_batch(rows=2), dense=batch.dense.expand(2, -1))
    alone = model(histories([[3, 7, 9], [1] * 6], two)).logits["click"][0]
    torch.testing.assert_close(model(histories([[3, 7, 9], []], two)).logits["click"][0], alone)


def test_what_attends_can_be_chosen() -> None:
    assert small_model("dmin")._targets == {"watched": 0, "liked": 0}
    chosen = small_model("dmin", targets={"liked": "tags"})
    assert chosen._targets == {"watched": 0, "liked": chosen.inputs.names.index("tags")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ("video", "user")}, "none of its features is a sequence"),
        ({"features": ("user", "watched")}, "no feature of kind sparse shares table 'video' with sequence 'watched'"),
        ({"targets": {"watched": "vidoe"}}, "'vidoe' is no feature of one vector that it reads; did you mean 'video'"),
        ({"targets": {"user": "video"}}, "'user' is no sequence that it reads; known: liked, watched"),
    ],
)
def test_bad_configs(changes: dict, message: str) -> None:
    config = small_config("dmin", **changes)
    with pytest.raises(ConfigError, match=message):
        config.check(SCHEMA, TASKS)
    with pytest.raises(ConfigError, match=message):
        build_model(config, SCHEMA, TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads 3: the width of a token, embedding_dim 8, is no multiple of it"),
        ({"interests": 3}, "interests 3: the width of a token, embedding_dim 8"),
        ({"embedding_dim": 16, "interests": 16, "scale": 0.5}, "scale 0.5 does not fit: interests 16"),
    ],
)
def test_sizes_that_do_not_go_together(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config("dmin", **changes)
