"""What the config says of GPUs, as far as it can be followed without one: devices, memories, plans, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as runs
from example_store import every_feature_schema
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, compute_kernel_to_embedding_location
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from rayfm.config import ConfigError, validate
from rayfm.training import learner as learner_module
from rayfm.training.config import TrainingConfig
from rayfm.training.device import full_float32, set_up, worker_device
from rayfm.training.learner import Learner
from rayfm.training.optim import fuse_table_optimizers
from rayfm.training.sharding import place, sharding_plan
from rayfm.training.table_memory import forget_caches
from rayfm.training.trainer import single_process_group

GPU: dict[str, Any] = {"gpus_per_worker": 1}


class Tables(nn.Module):
    """Three tables on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=[name])
                for name, rows in (("user", 10_000), ("ad", 600), ("hour", 24))
            ],
            device=torch.device("meta"),
        )


def plan(world: int, device: str = "cuda", **training: Any) -> dict[str, ParameterSharding]:
    """TorchRec's plan of the tables, which needs no GPU."""
    module, config = Tables(), TrainingConfig.model_validate({**GPU, "row_wise_from": 5_000, **training})
    fuse_table_optimizers(module, config, ["user", "ad", "hour"])
    placement = place(module, config, world)
    return dict(sharding_plan(module, placement, world, torch.device(device), config).plan["bags"].items())


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_a_table_larger_than_the_gpu_is_on_the_host_behind_a_cache(sharding: str) -> None:
    found = plan(
        4,
        sharding_overrides={"user": sharding},
        table_memory_overrides={
            "user": {"kind": "uvm_caching", "cache_load_factor": 0.05},
            "ad": {"kind": "uvm"},
        },
    )
    assert {name: where.compute_kernel for name, where in found.items()} == {
        "user": "fused_uvm_caching",
        "ad": "fused_uvm",
        "hour": "fused",
    }
    assert found["user"].sharding_type == sharding
    assert found["user"].cache_params is not None
    assert found["user"].cache_params.load_factor == 0.05
    assert found["ad"].cache_params is None
    assert found["hour"].cache_params is None
    places = {
        compute_kernel_to_embedding_location(EmbeddingComputeKernel(w.compute_kernel)).name for w in found.values()
    }
    assert places == {"MANAGED_CACHING", "MANAGED", "DEVICE"}, "as fbgemm calls them"


def test_all_tables_may_be_on_the_host_and_replicated_ones_stay() -> None:
    found = plan(2, table_memory={"kind": "uvm_caching"}, table_overrides={"hour": {"type": "adam"}})
    assert {name: where.compute_kernel for name, where in found.items()} == {
        "user": "fused_uvm_caching",
        "ad": "fused_uvm_caching",
        "hour": "dense",
    }
    assert found["user"].cache_params is not None
    assert found["user"].cache_params.load_factor == 0.2


def test_the_cpu_has_no_memories() -> None:
    found = plan(2, device="cpu", table_memory={"kind": "uvm"})
    assert {where.compute_kernel for where in found.values()} == {"fused"}


def test_shards_are_on_the_gpus_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two GPUs: rank 3 is the second of the second node."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shards = plan(4)["user"].sharding_spec.shards
    assert [str(shard.placement) for shard in shards] == [
        "rank:0/cuda:0",
        "rank:1/cuda:1",
        "rank:2/cuda:0",
        "rank:3/cuda:1",
    ]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"table_memory": {"kind": "uvm"}}, "table_memory of all tables is beside a GPU's, and workers have none"),
        ({"table_memory_overrides": {"ad": {"kind": "uvm"}}}, "table_memory of ad is beside a GPU's"),
        ({**GPU, "device": "cpu", "table_memory": {"kind": "uvm"}}, "workers have none"),
        ({"precision": "tf32"}, "precision tf32 is of GPUs"),
        ({**GPU, "device": "cpu", "precision": "tf32"}, "precision tf32 is of GPUs"),
        (
            {**GPU, "table_memory": {"kind": "uvm", "cache_load_factor": 0.5}},
            "cache_load_factor is of kind uvm_caching",
        ),
        ({**GPU, "table_memory": {"kind": "uvm_caching", "cache_load_factor": 1.5}}, "less than or equal to 1"),
        (
            {
                **GPU,
                "table_overrides": {"ad": {"type": "adam"}},
                "table_memory_overrides": {"ad": {"kind": "uvm"}},
            },
            "table 'ad': uvm is of the fused optimisers, and its own is adam",
        ),
        ({"pipeline": "sparse"}, "sparse_dist"),
    ],
)
def test_what_needs_a_gpu_or_does_not_fit_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainingConfig, training, "training")


def test_an_override_for_an_unknown_table_is_refused() -> None:
    config = TrainingConfig.model_validate({**GPU, "table_memory_overrides": {"adv": {"kind": "uvm"}}})
    with pytest.raises(ConfigError, match="table 'adv', which is not in the schema; did you mean 'ad'"):
        fuse_table_optimizers(Tables(), config, ["user", "ad", "hour"])


def test_workers_take_a_gpu_where_the_config_gives_them_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worker_device(3, TrainingConfig.model_validate(GPU)) == torch.device("cuda", 1)
    assert worker_device(3, TrainingConfig()) == torch.device("cpu"), (
        "GPUs that the config does not ask for are others'"
    )
    assert worker_device(3, TrainingConfig.model_validate({**GPU, "device": "cpu"})) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker_device(0, TrainingConfig.model_validate(GPU)) == torch.device("cpu")
    with pytest.raises(ConfigError, match="this worker sees no CUDA device"):
        worker_device(0, TrainingConfig.model_validate({**GPU, "device": "cuda"}))
    with pytest.raises(ConfigError, match="table_memory of all tables is beside a GPU's, and this worker has none"):
        worker_device(0, TrainingConfig.model_validate({**GPU, "table_memory": {"kind": "uvm"}}))


def test_tf32_is_for_matrix_products_of_gpus_and_not_for_the_check_of_an_export() -> None:
    cpu, before = torch.device("cpu"), torch.backends.cuda.matmul.allow_tf32
    try:
        set_up(cpu, TrainingConfig.model_validate({**GPU, "precision": "tf32"}))
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        with full_float32():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        set_up(cpu, TrainingConfig())
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_rows_that_are_reset_are_forgotten_by_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's look-ups have no caches, and take the call."""
    purged: list[nn.Module] = []
    monkeypatch.setattr(learner_module, "forget_caches", lambda module: (forget_caches(module), purged.append(module)))
    ids = torch.tensor([1, 2]).numpy()
    with single_process_group():
        for training in ({}, {**GPU, "table_memory": {"kind": "uvm_caching"}}):
            made = Learner(
                runs.learner(),
                TrainingConfig.model_validate(training),
                every_feature_schema(),
                torch.device("cpu"),
                tmp_path / "plan.json",
            )
            made.reset_rows("ad", ids)
            assert purged == ([made.module] if training else [])
