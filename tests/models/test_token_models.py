"""Wukong, DHEN, InterFormer: their layers against the equations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_batches import SCHEMA, TASKS, random_batch, small_config, small_model
from pydantic import ValidationError
from torch.nn import functional

from rayfm.config import ConfigError
from rayfm.models import build_model
from rayfm.models.attention import AttentionBlock
from rayfm.models.dhen import DHEN, CrossInteraction, DotInteraction, EnsembleLayer
from rayfm.models.dlrm import dot_interaction
from rayfm.models.interformer import (
    FeatureSummary,
    Gate,
    InterFormer,
    MaskNet,
    PersonalizedLinear,
    SequenceArch,
    SequenceSummary,
    newest_first,
)
from rayfm.models.sequences import PaddedSequence
from rayfm.models.tokens import TokenLinear, Tokens, ToTokens, token_shortcut
from rayfm.models.wukong import FactorizationBlock, Wukong, WukongLayer, low_rank_products


def test_token_linear_mixes_tokens_and_no_columns() -> None:
    layer = TokenLinear(3, 2)
    with torch.no_grad():
        layer.weight_MN.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, -1.0]]))
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    assert layer(x).tolist() == [[[5.0, 50.0], [-3.0, -30.0]]]
    assert token_shortcut(3, 3)(x) is x
    assert isinstance(token_shortcut(3, 2), TokenLinear)


def test_token_linear_keeps_the_variance() -> None:
    torch.manual_seed(0)
    out = TokenLinear(400, 300)(torch.randn(1, 400, 50))
    assert float(out.detach().var()) == pytest.approx(1.0, rel=0.1)


def test_dense_features_are_one_token() -> None:
    tokens = Tokens(2, 3, 4, (5,))
    embeddings, dense = torch.randn(6, 2, 4), torch.randn(6, 3)
    out = tokens(embeddings, dense)
    assert tokens.count == 3
    assert torch.equal(out[:, :2], embeddings)
    torch.testing.assert_close(out[:, 2], tokens.dense_arch(dense))
    none = Tokens(2, 0, 4, (5,))
    assert none.count == 2
    assert none(embeddings, dense[:, :0]) is embeddings


def test_an_mlp_is_cut_into_tokens() -> None:
    layer, x = ToTokens(5, (7,), 2, 3), torch.randn(4, 5)
    torch.testing.assert_close(layer(x).flatten(1), layer.output(layer.mlp(x)))


# -- Wukong ------------------------------------------------------------------------------------------------------------


def test_low_rank_products_are_those_of_the_whole_matrix() -> None:
    x, projection = torch.randn(2, 5, 3), torch.randn(5, 4)
    expected = x @ x.transpose(1, 2) @ projection
    projected = torch.einsum("nk,bne->bke", projection, x)
    torch.testing.assert_close(low_rank_products(x, projected), expected, rtol=1e-4, atol=1e-4)


def test_a_factorization_block_is_its_equation() -> None:
    block, x = FactorizationBlock(5, 3, 2, (7,), 4), torch.randn(6, 5, 4)
    products = x @ x.transpose(1, 2) @ block.projection.weight_MN.T
    expected = block.tokens.output(block.tokens.mlp(functional.layer_norm(products.flatten(1), (10,))))
    torch.testing.assert_close(block(x), expected.view(6, 3, 4), rtol=1e-4, atol=1e-4)


def test_a_wukong_layer_is_its_equation() -> None:
    config = Wukong.Config(embedding_dim=4, fm_tokens=2, linear_tokens=3, rank=2, fm_hidden=(6,))
    same, x = WukongLayer(5, config), torch.randn(6, 5, 4)
    blocks = torch.cat([same.factorization(x), same.linear(x)], dim=1)
    torch.testing.assert_close(same(x), functional.layer_norm(blocks + x, (4,)))
    other = WukongLayer(4, config)
    blocks = torch.cat([other.factorization(x[:, :4]), other.linear(x[:, :4])], dim=1)
    short_cut = torch.einsum("mn,bne->bme", other.shortcut.weight_MN, x[:, :4])
    torch.testing.assert_close(other(x[:, :4]), functional.layer_norm(blocks + short_cut, (4,)))


def test_wukong_stacks_layers_of_any_tokens() -> None:
    model = small_model("wukong", layers=3)
    assert [layer.linear.weight_MN.shape[1] for layer in model.layers] == [8, 5, 5]


# -- DHEN --------------------------------------------------------------------------------------------------------------


def test_dot_interaction_reads_dot_products_alone() -> None:
    layer, x = DotInteraction(4, 2, 3, (5,)), torch.randn(6, 4, 3)
    torch.testing.assert_close(layer(x), layer.tokens(dot_interaction(x)))
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    torch.testing.assert_close(layer(x @ rotation), layer(x), rtol=1e-3, atol=1e-4)


def test_cross_interaction_crosses_the_flat_tokens() -> None:
    layer, x = CrossInteraction(4, 2, 3, 5), torch.randn(6, 4, 3)
    first, second = layer.cross.layers[0]
    flat = x.flatten(1)
    crossed = flat * second(first(flat)) + flat
    expected = torch.einsum("mn,bne->bme", layer.linear.weight_MN, crossed.view(6, 4, 3))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("ensemble", ["concat", "sum"])
def test_an_ensemble_layer_is_its_equation(ensemble: str) -> None:
    config = DHEN.Config(embedding_dim=4, dot_hidden=(6,), cross_rank=3)
    layer, x = EnsembleLayer(5, 2, config, ensemble), torch.randn(6, 5, 4)
    outputs = [part(x) for part in layer.interactions]
    assert len(outputs) == 4
    joined = torch.cat(outputs, dim=1) if ensemble == "concat" else sum(outputs)
    assert layer.out_tokens == joined.shape[1] == (8 if ensemble == "concat" else 2)
    short_cut = torch.einsum("mn,bne->bme", layer.shortcut.weight_MN, x)
    torch.testing.assert_close(layer(x), functional.layer_norm(joined + short_cut, (4,)))


def test_dhen_has_the_modules_that_it_is_told() -> None:
    model = small_model("dhen", interactions=("attention", "linear"), ensemble="sum")
    assert [type(part).__name__ for part in model.layers[0].interactions] == ["AttentionInteraction", "TokenLinear"]
    assert [layer.out_tokens for layer in model.layers] == [2, 2]
    model(random_batch()).logits["click"].sum().backward()
    assert isinstance(model.layers[0].interactions[0].block, AttentionBlock)


# -- InterFormer -------------------------------------------------------------------------------------------------------


def test_sequences_are_turned_to_their_newest_item() -> None:
    values = torch.arange(1.0, 7.0).view(2, 3, 1)
    sequence = PaddedSequence(values * torch.tensor([[1.0, 1, 0], [0, 0, 0]]).unsqueeze(2), torch.tensor([2, 0]))
    assert newest_first(sequence, 4)[..., 0].tolist() == [[2.0, 1.0, 0.0, 0.0], [0.0] * 4]


def test_gates_masks_and_summaries_are_their_equations() -> None:
    gate, x = Gate(3), torch.randn(2, 4, 3)
    torch.testing.assert_close(gate(x), torch.sigmoid(x @ gate.linear.weight.T + gate.linear.bias) * x)
    summary = FeatureSummary(4, 2, 3)
    torch.testing.assert_close(summary(x), summary.gate(torch.einsum("mn,bne->bme", summary.compress.weight_MN, x)))
    mask, s = MaskNet(2, 3), torch.randn(2, 5, 6)
    first, _, second = mask.mask
    torch.testing.assert_close(mask(s), mask.compress(s * second(first(s).relu())))


def test_personalized_linear_has_a_matrix_for_each_example() -> None:
    layer, summary, s = PersonalizedLinear(2, 3), torch.randn(4, 2, 3), torch.randn(4, 5, 3)
    out = layer(summary, s)
    for row in range(4):
        matrix = (layer.matrix.weight @ summary[row].flatten() + layer.matrix.bias).view(3, 3)
        torch.testing.assert_close(out[row], s[row] @ matrix)


def test_a_sequence_summary_has_three_parts() -> None:
    config = InterFormer.Config(embedding_dim=4, heads=2, pooled_tokens=3, recent_tokens=2)
    summary = SequenceSummary(2, config)
    s, mask = torch.randn(2, 7, 4), torch.tensor([[True] * 7, [True, True, True] + [False] * 4])
    out = summary(s, mask)
    assert summary.out_tokens == out.shape[1] == 7
    torch.testing.assert_close(out[:, :2], summary.gate(s[:, :2]))
    torch.testing.assert_close(out[:, 5:], summary.gate(s[:, 2:4]))
    pooled = summary.pool(summary.queries.tokens_SE.expand(2, -1, -1), s, mask)
    torch.testing.assert_close(out[:, 2:5], summary.gate(pooled))


def test_the_sequence_arch_knows_order_and_ignores_padding() -> None:
    config = InterFormer.Config(embedding_dim=4, heads=2)
    arch, s, summary = SequenceArch(2, config), torch.randn(1, 5, 4), torch.randn(1, 2, 4)
    mask = torch.tensor([[True, True, True, True, False]])
    out = arch(s, summary, mask)
    assert not out[0, 4].any()
    padded = s.clone()
    padded[0, 4] = 9.0
    torch.testing.assert_close(arch(padded, summary, mask), out)
    turned = s[:, [1, 0, 2, 3, 4]]
    assert not torch.allclose(arch(turned, summary, mask)[:, 2], out[:, 2]), "rotary positions"
    assert not torch.allclose(arch(s, summary + 1, mask), out), "the features' summary"


def test_features_and_sequences_reach_each_other() -> None:
    """After one layer X depends on the sequence and S on the features, not only the last MLP."""
    model = small_model("interformer", layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    layer = model.layers[0]
    x, s = torch.randn(1, model.tokens.count, 8), torch.randn(1, 8, 8)
    mask = torch.ones(1, 8, dtype=torch.bool)
    x_after, s_after = layer(x, s, mask)
    assert not torch.allclose(layer(x, s + torch.randn_like(s), mask)[0], x_after)
    assert not torch.allclose(layer(x + torch.randn_like(x), s, mask)[1], s_after)
    assert x_after.shape == x.shape
    assert s_after.shape == s.shape


def test_interformer_without_any_history() -> None:
    model, batch = small_model("interformer"), random_batch()
    empty = dataclasses.replace(
        batch,
        sequence=type(batch.sequence)(
            keys=batch.sequence.keys(),
            values=batch.sequence.values()[:0],
            lengths=torch.zeros_like(batch.sequence.lengths()),
        ),
    )
    output = model(empty)
    assert output.representation.isfinite().all()
    sum(logit.sum() for logit in output.logits.values()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dhen", {"interactions": ("dot", "dot")}, "'dot' stands twice"),
        ("dhen", {"interactions": ()}, "at least 1 item"),
        ("dhen", {"heads": 3}, "heads 3: the width of a token, embedding_dim 8"),
        ("interformer", {"heads": 8}, "embedding_dim 8, is no multiple of twice it"),
        ("wukong", {"rank": 0}, "greater than 0"),
    ],
)
def test_bad_sizes(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config(kind, **changes)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (("video", "user"), "interformer reads what a user did item by item, and none of its features is a sequence"),
        (("watched", "liked"), "it has only sequences; add others to 'features'"),
    ],
)
def test_features_that_interformer_cannot_read(features: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(small_config("interformer", features=features), SCHEMA, TASKS)


@pytest.mark.parametrize("kind", ["wukong", "dhen", "interformer", "dmin"])
def test_a_scaled_model_is_larger_and_works(kind: str) -> None:
    sizes = {}
    for scale in (1.0, 2.0):
        model = small_model(kind, scale=scale)
        assert model(random_batch(rows=3)).logits["click"].shape == (3,)
        sizes[scale] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes[2.0] > 1.5 * sizes[1.0]
