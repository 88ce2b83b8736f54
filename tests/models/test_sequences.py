from __future__ import annotations

import dataclasses

import pytest
import torch
from model_batches import SCHEMA, random_batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import ConfigError, DataError
from rayfm.data.batch import Batch
from rayfm.models.embeddings import FeatureEmbeddings, select_features
from rayfm.models.sequences import PaddedSequence, SequenceEmbeddings, averages
from rayfm.schema import Feature, Schema, Table, Task

LISTS = Schema(
    tables={"video": Table(rows=20), "user": Table(rows=9)},
    features=(
        Feature(name="shown", kind="multi", table="video", max_len=3),
        Feature(name="watched", kind="sequence", table="video", max_len=4),
        Feature(name="user", kind="sparse"),
    ),
    tasks=(Task(name="click"),),
)


def lookup(schema: Schema = SCHEMA, names: tuple[str, ...] | None = None) -> SequenceEmbeddings:
    torch.manual_seed(0)
    return SequenceEmbeddings(schema, select_features(schema, names), 8, reader="dmin")


def with_watched(lists: list[list[int]], batch: Batch) -> Batch:
    """``batch`` with these histories alone."""
    ids = KeyedJaggedTensor(
        keys=["watched"],
        values=torch.tensor([item for items in lists for item in items], dtype=torch.int64),
        lengths=torch.tensor([len(items) for items in lists], dtype=torch.int32),
    )
    return dataclasses.replace(batch, sequence=ids)


def test_a_sequence_keeps_its_items_in_order_and_ends_in_zeros() -> None:
    embeddings = lookup(LISTS)
    batch = with_watched([[3, 7, 3], [], [1, 2, 5, 6]], random_batch(rows=3))
    batch = dataclasses.replace(
        batch,
        sparse=KeyedJaggedTensor(
            keys=["shown", "user"],
            values=torch.tensor([4, 6, 9, 0, 1, 2]),
            lengths=torch.tensor([2, 0, 1, 1, 1, 1], dtype=torch.int32),
        ),
    )
    vectors, sequences = embeddings(batch)
    table = embeddings.unpooled.embeddings["video"].weight
    watched = sequences["watched"]
    torch.testing.assert_close(watched.values[0], torch.stack([table[3], table[7], table[3], torch.zeros(8)]))
    assert not watched.values[1].any()
    torch.testing.assert_close(watched.values[2], table[[1, 2, 5, 6]])
    assert watched.mask.tolist() == [[True, True, True, False], [False] * 4, [True] * 4]
    assert watched.ages.tolist() == [[2, 1, 0, 0], [0] * 4, [3, 2, 1, 0]]
    # The list of the same table is averaged after the look-up; the table without a sequence stays pooled.
    assert embeddings.names == ("shown", "user")
    torch.testing.assert_close(vectors[:, 0], torch.stack([(table[4] + table[6]) / 2, torch.zeros(8), table[9]]))
    users = embeddings.pooled.bags.embedding_bags["user"].weight
    torch.testing.assert_close(vectors[:, 1], users[:3])


def test_pooled_features_are_what_the_pooled_look_up_gives() -> None:
    batch, pooled, unpooled = random_batch(), FeatureEmbeddings(SCHEMA, list(SCHEMA.features), 8), lookup()
    assert set(unpooled.names) == set(pooled.names) - {"watched", "liked"}
    with torch.no_grad():
        tables = {name.split(".")[-2]: value for name, value in unpooled.state_dict().items()}
        for name, value in pooled.named_parameters():
            value.copy_(tables[name.split(".")[-2]])
    vectors, sequences = unpooled(batch)
    expected = dict(zip(pooled.names, pooled(batch).unbind(dim=1), strict=True))
    for position, name in enumerate(unpooled.names):
        torch.testing.assert_close(vectors[:, position], expected[name])
    for name, sequence in sequences.items():
        mean = sequence.values.sum(1) / sequence.lengths.clamp_min(1).unsqueeze(1)
        torch.testing.assert_close(mean, expected[name])


def test_each_table_is_there_once() -> None:
    tables = [name.split(".")[-2] for name, _ in lookup().named_parameters()]
    assert sorted(tables) == ["tag", "topic", "user", "video"]


def test_a_batch_without_rows_or_without_a_sequence() -> None:
    vectors, sequences = lookup()(random_batch(rows=0))
    assert vectors.shape == (0, 5, 8)
    assert {name: tuple(item.values.shape) for name, item in sequences.items()} == {
        "watched": (0, 6, 8),
        "liked": (0, 6, 8),
    }
    with pytest.raises(DataError, match="lacks feature 'watched'"):
        lookup()(dataclasses.replace(random_batch(), sequence=None))
    only = lookup(names=("watched",))
    vectors, _ = only(random_batch())
    assert vectors.shape == (32, 0, 8)


def test_gradients_reach_the_shared_table_from_items_and_targets() -> None:
    batch, embeddings = random_batch(), lookup()
    vectors, sequences = embeddings(batch)
    (vectors.sum() + sequences["watched"].values.sum()).backward()
    gradient = embeddings.unpooled.embeddings["video"].weight.grad
    counts = torch.bincount(
        torch.cat([batch.sparse["video"].values(), batch.sequence["watched"].values()]), minlength=60
    )
    torch.testing.assert_close(gradient, counts.unsqueeze(1).expand(60, 8).float())


def test_averages_of_jagged_lists() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = averages(values, torch.tensor([2, 0, 1], dtype=torch.int32))
    assert found.tolist() == [[2.0, 3.0], [0.0, 0.0], [5.0, 6.0]]


def test_masks_follow_lengths() -> None:
    sequence = PaddedSequence(torch.zeros(2, 3, 4), torch.tensor([0, 2]))
    assert sequence.mask.tolist() == [[False] * 3, [True, True, False]]
    assert sequence.ages.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_schemas_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="none of its features is a sequence; add one of kind sequence"):
        lookup(names=("video", "user"))
    endless = LISTS.model_copy(
        update={"features": (Feature(name="watched", kind="sequence", table="video"), LISTS.features[2])}
    )
    with pytest.raises(ConfigError, match="'watched': dmin pads it to its longest; give it a 'max_len'"):
        lookup(endless)
    weighted = LISTS.model_copy(
        update={"features": (Feature(name="bought", kind="weighted", table="video"), LISTS.features[1])}
    )
    with pytest.raises(ConfigError, match="'bought' is weighted and shares table 'video' with a sequence"):
        lookup(weighted)
