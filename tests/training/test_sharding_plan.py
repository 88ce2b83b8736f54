from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from rayfm.config import ConfigError
from rayfm.training.config import TrainingConfig
from rayfm.training.sharding import TablePlacement, place, sharding_plan, stored_placement

SIZES = {"user": 1000, "ad": 600, "tag": 500, "topic": 100, "hour": 24}
ADAM = {"type": "adam", "lr": 0.01}


class Lookups(nn.Module):
    """Two collections, as a model with weighted features has."""

    def __init__(self, sizes: dict[str, int] = SIZES, dim: int = 8) -> None:
        super().__init__()
        first = {name: rows for name, rows in sizes.items() if name != "topic"}
        second = {name: rows for name, rows in sizes.items() if name == "topic"}
        for attribute, tables in (("plain", first), ("weighted", second)):
            configs = [
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name])
                for name, rows in tables.items()
            ]
            setattr(self, attribute, EmbeddingBagCollection(tables=configs, device=torch.device("meta")))


def kinds(config: TrainingConfig, world: int = 2) -> dict[str, str]:
    placement = place(Lookups(), config, world)
    return {table: where.kind for tables in placement.values() for table, where in tables.items()}


def test_auto_cuts_only_large_tables():
    assert kinds(TrainingConfig(row_wise_from=600)) == {
        "user": "row_wise",
        "ad": "row_wise",
        "tag": "table_wise",
        "topic": "table_wise",
        "hour": "table_wise",
    }
    assert set(kinds(TrainingConfig()).values()) == {"table_wise"}
    assert set(kinds(TrainingConfig(row_wise_from=1)).values()) == {"row_wise"}


def test_overrides_come_before_the_rule():
    config = TrainingConfig(
        sharding="row_wise", sharding_overrides={"tag": "table_wise", "ad": "auto"}, table_overrides={"hour": ADAM}
    )
    assert kinds(config) == {
        "user": "row_wise",
        "ad": "table_wise",
        "tag": "table_wise",
        "topic": "row_wise",
        "hour": "data_parallel",
    }


def test_adam_everywhere_replicates_everything():
    assert set(kinds(TrainingConfig(tables=ADAM)).values()) == {"data_parallel"}


def test_table_wise_tables_balance_over_the_workers():
    placement = place(Lookups(), TrainingConfig(), world=2)
    owners = {table: where.rank for tables in placement.values() for table, where in tables.items()}
    # Largest first to the emptier worker: 1000 | 600 + 500; then 24 and, of the other collection, 100 to the first.
    assert owners == {"user": 0, "ad": 1, "tag": 1, "hour": 0, "topic": 0}
    load = [sum(SIZES[table] for table in owners if owners[table] == rank) for rank in range(2)]
    assert max(load) - min(load) <= 24 + 100


def test_column_wise_tables_have_as_many_parts_on_any_number_of_workers():
    """8 columns make two parts; each goes to the worker with the fewest elements so far."""
    for world, owners in ((1, (0, 0)), (2, (0, 1)), (4, (0, 1))):
        placement = place(Lookups(), TrainingConfig(sharding_overrides={"user": "column_wise"}), world)
        assert placement["plain"]["user"] == TablePlacement(kind="column_wise", ranks=owners)
    four = place(Lookups(), TrainingConfig(sharding="column_wise"), 4)
    assert {table: where.ranks for table, where in four["plain"].items()} == {
        "user": (0, 1),
        "ad": (2, 3),
        "tag": (2, 3),
        "hour": (0, 1),
    }
    module = Lookups()
    plan = sharding_plan(module, place(module, TrainingConfig(sharding="column_wise"), 4), 4, torch.device("cpu")).plan
    shards = plan["plain"]["tag"].sharding_spec.shards
    assert [(tuple(shard.shard_sizes), tuple(shard.shard_offsets)) for shard in shards] == [
        ((500, 4), (0, 0)),
        ((500, 4), (0, 4)),
    ]


def test_row_wise_tables_have_no_owner_and_weigh_nothing():
    placement = place(Lookups(), TrainingConfig(row_wise_from=600), world=2)["plain"]
    assert (placement["user"].rank, placement["ad"].rank) == (None, None)
    assert (placement["tag"].rank, placement["hour"].rank) == (0, 1)


def test_the_placement_does_not_depend_on_the_order_of_the_tables():
    again = Lookups(dict(reversed(SIZES.items())))
    assert place(again, TrainingConfig(), 3) == place(Lookups(), TrainingConfig(), 3)


def test_the_plan_is_torchrecs():
    config = TrainingConfig(row_wise_from=1000, table_overrides={"hour": ADAM})
    module = Lookups()
    plan = sharding_plan(module, place(module, config, 2), 2, torch.device("cpu")).plan
    assert set(plan) == {"plain", "weighted"}
    found = {table: part.sharding_type for table, part in plan["plain"].items()}
    assert found == {
        "user": ShardingType.ROW_WISE.value,
        "ad": ShardingType.TABLE_WISE.value,
        "tag": ShardingType.TABLE_WISE.value,
        "hour": ShardingType.DATA_PARALLEL.value,
    }
    assert {table: plan["plain"][table].ranks for table in ("ad", "tag")} == {"ad": [0], "tag": [1]}
    shards = plan["plain"]["user"].sharding_spec.shards
    assert [tuple(shard.shard_sizes) for shard in shards] == [(500, 8), (500, 8)]


def test_a_stored_placement_is_used_again(tmp_path):
    path = tmp_path / "plans" / "vm.json"
    made = stored_placement(path, Lookups(), TrainingConfig(), 2, write=True)
    assert made == place(Lookups(), TrainingConfig(), 2)
    # The plan's rules have changed since: what is stored holds.
    changed = TrainingConfig(row_wise_from=1)
    assert stored_placement(path, Lookups(), changed, 2, write=True) == made
    assert stored_placement(path, Lookups(), changed, 2, write=False) == made


def test_other_numbers_of_workers_have_plans_of_their_own(tmp_path):
    path = tmp_path / "vm.json"
    two = stored_placement(path, Lookups(), TrainingConfig(), 2, write=True)
    three = stored_placement(path, Lookups(), TrainingConfig(), 3, write=True)
    assert {where.rank for where in three["plain"].values()} == {0, 1, 2}
    assert stored_placement(path, Lookups(), TrainingConfig(), 2, write=False) == two
    assert set(json.loads(path.read_text())) == {"2", "3"}


def test_only_rank_0_writes(tmp_path):
    path = tmp_path / "vm.json"
    stored_placement(path, Lookups(), TrainingConfig(), 2, write=False)
    assert not path.exists()


@pytest.mark.parametrize(
    "sizes", [{**SIZES, "more": 10}, {name: rows for name, rows in SIZES.items() if name != "hour"}]
)
def test_a_plan_for_other_tables_is_refused(tmp_path, sizes):
    path = tmp_path / "vm.json"
    stored_placement(path, Lookups(), TrainingConfig(), 2, write=True)
    with pytest.raises(ConfigError, match=r"vm\.json: the stored sharding plan is for other tables"):
        stored_placement(path, Lookups(sizes), TrainingConfig(), 2, write=False)


def test_a_placement_survives_its_file():
    where = TablePlacement(kind="table_wise", rank=1)
    assert TablePlacement.model_validate(json.loads(json.dumps(where.dump()))) == where


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sharding": "data_parallel"}, "sharding data_parallel needs 'tables: {type: adam}'"),
        ({"sharding_overrides": {"tag": "data_parallel"}}, "table 'tag': sharding data_parallel does not go with"),
        ({"tables": ADAM, "sharding_overrides": {"tag": "row_wise"}}, "table 'tag': sharding row_wise does not go"),
        (
            {"tables": ADAM, "sharding": "data_parallel", "table_overrides": {"tag": {"type": "sgd"}}},
            "table 'tag': optimiser sgd is for shards, and sharding is data_parallel",
        ),
        ({"device": "cuda"}, "device cuda needs gpus_per_worker above 0"),
        ({"workers": 4, "max_workers": 2}, "max_workers 2 is below workers 4; raise it, or leave it out"),
        ({"divergence": {"factor": 0.5}}, "greater than 1"),
    ],
)
def test_what_cannot_be_is_refused_at_config_time(config, expected):
    with pytest.raises(ValueError, match=expected):
        TrainingConfig.model_validate(config)


def test_a_fused_table_beside_replicated_ones_needs_a_place():
    config = TrainingConfig.model_validate(
        {
            "tables": ADAM,
            "sharding": "data_parallel",
            "table_overrides": {"tag": {"type": "sgd"}},
            "sharding_overrides": {"tag": "row_wise"},
        }
    )
    assert kinds(config)["tag"] == "row_wise"
    assert kinds(config)["ad"] == "data_parallel"
