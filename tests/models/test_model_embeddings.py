from __future__ import annotations

import dataclasses

import pytest
import torch
from model_batches import SCHEMA, random_batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import ConfigError, DataError
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings, select_features
from rayfm.schema import Feature, Schema, Table, Task


def embeddings(names: tuple[str, ...] | None = None, dim: int = 8) -> FeatureEmbeddings:
    torch.manual_seed(0)
    return FeatureEmbeddings(SCHEMA, select_features(SCHEMA, names), dim)


def test_each_feature_is_pooled_from_its_own_table() -> None:
    batch = random_batch()
    lookup = embeddings()
    out = lookup(batch)
    assert lookup.names == ("video", "user", "watched", "tags", "topics", "liked", "country")
    assert out.shape == (32, 7, 8)
    tables = {
        config.name: bags.embedding_bags[config.name].weight
        for bags in (lookup.bags, lookup.weighted_bags)
        for config in bags.embedding_bag_configs()
    }
    assert set(tables) == {"video", "user", "tag", "topic"}  # the shared ones once
    for position, name in enumerate(lookup.names):
        feature = SCHEMA.feature(name)
        keyed = {"sparse": batch.sparse, "multi": batch.sparse, "weighted": batch.weighted, "sequence": batch.sequence}
        jagged = keyed[feature.kind][name]
        for row, ids in enumerate(jagged.to_dense()):
            vectors = tables[feature.table_name][ids]
            if feature.kind == "weighted":
                expected = (jagged.to_dense_weights()[row].unsqueeze(1) * vectors).sum(0)
            else:
                expected = vectors.sum(0) / max(len(ids), 1)
            torch.testing.assert_close(out[row, position], expected)


def test_a_subset_reads_a_batch_with_more_keys_and_in_any_order() -> None:
    batch = random_batch()
    some = embeddings(("country", "liked", "video", "topics"))
    assert some.names == ("video", "topics", "liked", "country")
    out = some(batch)
    reordered = dataclasses.replace(
        batch,
        sparse=KeyedJaggedTensor.from_jt_dict({key: batch.sparse[key] for key in ["tags", "country", "user", "video"]}),
    )
    torch.testing.assert_close(some(reordered), out, rtol=0, atol=0)
    torch.testing.assert_close(some(batch), out, rtol=0, atol=0)


def test_a_batch_without_sequences_or_without_rows() -> None:
    lookup = embeddings(("video", "user"))
    batch = dataclasses.replace(random_batch(), sequence=None, weighted=None)
    assert lookup(batch).shape == (32, 2, 8)
    assert embeddings()(random_batch(rows=0)).shape == (0, 7, 8)
    assert embeddings(("age",))(batch).shape == (32, 0, 8)


def test_a_missing_feature_is_named() -> None:
    batch = dataclasses.replace(random_batch(), sequence=None)
    with pytest.raises(DataError, match="lacks feature 'watched'"):
        embeddings()(batch)


def test_gradients_reach_a_shared_table_from_both_kinds() -> None:
    batch = random_batch()
    lookup = embeddings(("video", "watched"))
    lookup(batch).sum().backward()
    gradient = lookup.bags.embedding_bags["video"].weight.grad
    for jagged in (batch.sparse["video"], batch.sequence["watched"]):
        assert gradient[jagged.values()].abs().sum(1).min() > 0


def test_dense_columns_are_picked_by_name() -> None:
    batch = random_batch()
    features = select_features(SCHEMA, ("duration", "video"))
    torch.testing.assert_close(DenseFeatures(SCHEMA, features)(batch), batch.dense[:, 1:])
    narrow = dataclasses.replace(batch, dense=batch.dense[:, 1:])
    torch.testing.assert_close(DenseFeatures(SCHEMA, features)(narrow), batch.dense[:, 1:])
    with pytest.raises(DataError, match="3 dense columns"):
        DenseFeatures(SCHEMA, features)(dataclasses.replace(batch, dense=torch.zeros(32, 3)))


def test_bad_features_and_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'watched'"):
        select_features(SCHEMA, ("watch_ed",))
    with pytest.raises(ConfigError, match="empty"):
        select_features(SCHEMA, ())
    mixed = Schema(
        tables={"t": Table(rows=4)},
        features=(Feature(name="a", kind="sparse", table="t"), Feature(name="b", kind="weighted", table="t")),
        tasks=(Task(name="click"),),
    )
    with pytest.raises(ConfigError, match="'b' is weighted and shares table 't' with 'a'"):
        FeatureEmbeddings(mixed, list(mixed.features), 8)
    for name in ("type", "a.b"):
        odd = Schema(tables={name: Table(rows=4)}, features=(Feature(name=name, kind="sparse"),), tasks=SCHEMA.tasks)
        with pytest.raises(ConfigError, match="rename it"):
            FeatureEmbeddings(odd, list(odd.features), 8)
