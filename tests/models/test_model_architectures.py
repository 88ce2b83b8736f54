from __future__ import annotations

import dataclasses
import doctest
import importlib
import itertools

import pytest
import torch
from model_batches import SCHEMA, SIZES, TASKS, is_table, random_batch, small_config, small_model
from pydantic import ValidationError
from torch import nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from rayfm.config import Config, ConfigError, validate
from rayfm.models import MODELS, build_model
from rayfm.models.dcnv2 import CrossNetwork
from rayfm.models.dlrm import dot_interaction
from rayfm.models.fm import ProductHeads, pairwise_interactions
from rayfm.models.heads import TaskHeads
from rayfm.models.mlp import MLP

KINDS = sorted(SIZES)


def test_every_model_is_registered() -> None:
    assert set(KINDS) <= set(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_gradients(kind: str) -> None:
    model = small_model(kind)
    batch = random_batch()
    output = model(batch)
    assert output.representation.shape == (32, model.representation_dim)
    assert set(output.logits) == set(TASKS)
    assert all(logit.shape == (32,) and logit.dtype == torch.float32 for logit in output.logits.values())
    sum(logit.square().sum() for logit in output.logits.values()).backward()
    # One step away from the start, as some weights start at zero.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * torch.nn.functional.normalize(parameter.grad.flatten(), dim=0).view_as(parameter))
            parameter.grad = None
    sum(logit.square().sum() for logit in model(batch).logits.values()).backward()
    dead = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("kind", KINDS)
def test_without_dense_features_and_with_one_task(kind: str) -> None:
    names = tuple(feature.name for feature in SCHEMA.features if feature.kind != "dense")
    changes = {"item_features": ("video",)} if kind == "two_tower" else {}
    model = small_model(kind, tasks=("click",), features=names, **changes)
    output = model(random_batch())
    assert list(output.logits) == ["click"]
    assert output.representation.shape == (32, model.representation_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_fp32_at_the_ends(kind: str) -> None:
    model, batch = small_model(kind), random_batch()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.representation.dtype == torch.float32
    for task in TASKS:
        assert output.logits[task].dtype == torch.float32
        torch.testing.assert_close(output.logits[task], exact.logits[task], rtol=0.05, atol=0.02)
    sum(logit.sum() for logit in output.logits.values()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_meta(kind: str) -> None:
    state = torch.get_rng_state()
    first, second = small_model(kind, seed=7).state_dict(), small_model(kind, seed=7).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = small_model(kind, seed=8).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)

    sharded = build_model(small_config(kind), SCHEMA, TASKS, embedding_device=torch.device("meta"), seed=7)
    for name, value in sharded.state_dict().items():
        assert value.is_meta == is_table(name), name

    with torch.device("meta"):
        nothing = build_model(small_config(kind), SCHEMA, TASKS)
    assert all(value.is_meta for value in nothing.state_dict().values())
    # Whatever owns a parameter can be given values, as DistributedModelParallel does.
    owners = [m for m in nothing.modules() if list(m.parameters(recurse=False))]
    assert all(hasattr(owner, "reset_parameters") for owner in owners)
    assert not list(nothing.buffers())


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match="'clik' is not in the schema; did you mean 'click'"):
        build_model(small_config("fm"), SCHEMA, ("clik",))
    with pytest.raises(ConfigError, match="at least one"):
        build_model(small_config("fm"), SCHEMA, ())
    with pytest.raises(ValidationError, match="multiple of 4"):
        small_config("fm", embedding_dim=10)
    with pytest.raises(ValidationError, match="both towers"):
        small_config("two_tower", user_features=("video",))
    with pytest.raises(ConfigError, match="not in 'features'"):
        small_model("two_tower", features=("user", "video"))
    with pytest.raises(ConfigError, match="user tower has no feature"):
        small_model("two_tower", features=("video",), item_features=("video",))


def test_a_config_file_names_a_model() -> None:
    from typing import Annotated

    from rayfm.models import ModelConfig

    class Holder(Config):
        model: Annotated[ModelConfig, MODELS]

    held = validate(Holder, {"model": {"type": "dcnv2", "low_rank": 4}})
    assert held.model == MODELS["dcnv2"].Config(low_rank=4)
    with pytest.raises(ConfigError, match="did you mean 'cross_layers'"):
        validate(Holder, {"model": {"type": "dcnv2", "cross_layer": 4}})


def test_dot_interaction_is_all_pairs() -> None:
    x = torch.randn(3, 5, 4)
    expected = [(x[:, i] * x[:, j]).sum(1) for i, j in itertools.combinations(range(5), 2)]
    torch.testing.assert_close(dot_interaction(x), torch.stack(expected, dim=1))
    assert dot_interaction(x[:, :1]).shape == (3, 0)


def test_pairwise_interactions_is_all_pairs() -> None:
    x = torch.randn(3, 5, 4)
    expected = sum(x[:, i] * x[:, j] for i, j in itertools.combinations(range(5), 2))
    torch.testing.assert_close(pairwise_interactions(x), expected)


@pytest.mark.parametrize("low_rank", [None, 3])
def test_cross_network_computes_torchrecs(low_rank: int | None) -> None:
    ours = CrossNetwork(6, 2, low_rank)
    theirs = CrossNet(6, 2) if low_rank is None else LowRankCrossNet(6, 2, low_rank)
    with torch.no_grad():
        for position, layer in enumerate(ours.layers):
            if low_rank is None:
                layer.weight.copy_(theirs.kernels[position])
                theirs.bias[position].copy_(layer.bias.unsqueeze(1))
            else:
                layer[0].weight.copy_(theirs.V_kernels[position])
                layer[1].weight.copy_(theirs.W_kernels[position])
                theirs.bias[position].copy_(layer[1].bias)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_fm_is_the_textbook_one() -> None:
    names = ("age", "user", "video", "duration")
    model = small_model("fm", tasks=("click",), features=names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    batch = random_batch()
    ids = {name: batch.sparse[name].values() for name in ("user", "video")}
    terms = model.terms
    w = [terms.dense_factors.weights_DT[i] * batch.dense[:, [i]] for i in range(2)]
    v = [terms.dense_factors.factors_DE[i] * batch.dense[:, [i]] for i in range(2)]
    for name in ids:
        w.append(terms.weights.bags.embedding_bags[name].weight[ids[name], :1])
        v.append(terms.factors.bags.embedding_bags[name].weight[ids[name]])
    expected = model.heads.bias_T + sum(w)[:, 0]
    expected = expected + sum((a * b).sum(1) for a, b in itertools.combinations(v, 2))
    torch.testing.assert_close(model(batch).logits["click"], expected)


def test_product_heads_start_as_a_sum_for_every_task() -> None:
    x = torch.randn(4, 6)
    torch.testing.assert_close(ProductHeads(6, 3)(x), x.sum(1, keepdim=True).expand(4, 3))
    assert sum(p.numel() for p in ProductHeads(6, 1).parameters()) == 1


def test_deepfm_is_the_sum_of_its_parts() -> None:
    model, batch = small_model("deepfm"), random_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    embeddings, pairwise, linear = model.terms(batch)
    deep = model.deep(torch.cat([embeddings.flatten(1), batch.dense], dim=1))
    for position, task in enumerate(TASKS):
        expected = model.product_heads(pairwise)[:, position] + linear[:, position] + model.heads(deep)[task]
        torch.testing.assert_close(model(batch).logits[task], expected)


def test_two_tower_is_an_inner_product_of_what_each_side_reads() -> None:
    model = small_model("two_tower", tasks=("click",), temperature=0.5)
    batch = random_batch()
    user, item = model.vectors(batch)
    torch.testing.assert_close(model(batch).logits["click"], 2 * (user * item).sum(1) + model.heads.bias_T)
    # An item feature moves the item alone, any other the user alone.
    dense = batch.dense.clone()
    dense[:, 1] += 1
    changed_user, changed_item = model.vectors(dataclasses.replace(batch, dense=dense))
    assert torch.equal(changed_user, user)
    assert not torch.equal(changed_item, item)
    dense = batch.dense.clone()
    dense[:, 0] += 1
    changed_user, changed_item = model.vectors(dataclasses.replace(batch, dense=dense))
    assert not torch.equal(changed_user, user)
    assert torch.equal(changed_item, item)


def test_the_mlp_top_reads_both_vectors_and_their_product() -> None:
    model, batch = small_model("two_tower", top="mlp", top_hidden=(9,)), random_batch()
    user, item = model.vectors(batch)
    output = model(batch)
    layer = model.top.layers[0]
    expected = (torch.cat([user, item, user * item], dim=1) @ layer.weight.T + layer.bias).relu()
    torch.testing.assert_close(output.representation, expected)
    torch.testing.assert_close(output.logits["watch"], model.heads(expected)["watch"])
    assert model.representation_dim == 9
    assert small_model("two_tower", top="mlp").representation_dim == 12
    sum(logit.square().sum() for logit in output.logits.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]


def test_the_mlp_top_takes_heads_as_other_models_do() -> None:
    sharing = {"type": "mmoe", "experts": 2, "expert_hidden": (5,), "depends_on": {"watch": "click"}}
    model = small_model("two_tower", top="mlp", head=(6,), multi_task=sharing)
    logits = model(random_batch()).logits
    assert list(logits) == list(TASKS)
    assert model.heads.towers["watch"].hidden.layers[0].in_features == 5 + 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head": (4,)}, "top 'dot' has no 'head'"),
        ({"top_hidden": (4,)}, "top 'dot' has no 'top_hidden'"),
        ({"multi_task": {"type": "mmoe"}}, "top 'dot' has no 'multi_task'"),
        ({"top": "mlp", "temperature": 0.5}, "top 'mlp' has no 'temperature'"),
    ],
)
def test_a_key_of_the_other_top_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        small_config("two_tower", **changes)


def test_normalised_towers_have_vectors_of_length_one() -> None:
    user, item = small_model("two_tower", normalize=True).vectors(random_batch())
    torch.testing.assert_close(user.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(item.norm(dim=1), torch.ones(32))


def test_mlp_layers() -> None:
    mlp = MLP(3, (5, 4), dropout=0.5, layer_norm=True)
    assert [type(layer) for layer in mlp.layers] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout] * 2
    assert MLP(3, ()).out_dim == 3


def test_task_heads_are_columns_or_towers() -> None:
    x = torch.randn(4, 6)
    linear = TaskHeads(6, TASKS)
    for position, task in enumerate(TASKS):
        expected = x @ linear.linear.weight[position] + linear.linear.bias[position]
        torch.testing.assert_close(linear(x)[task], expected)
    towers = TaskHeads(6, TASKS, hidden=(5,))
    towers(x)["click"].sum().backward()
    assert towers.towers["watch"].output.weight.grad is None
    with pytest.raises(ConfigError, match="rename it"):
        TaskHeads(6, ("keys",), hidden=(5,))


@pytest.mark.parametrize("module", ["attention", "embeddings", "mlp", "sequences", "tokens", *KINDS])
def test_docstring_examples_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"rayfm.models.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
