from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rayfm.config import ConfigError
from rayfm.training.config import TrainingConfig
from rayfm.training.optim import Optimizers, fuse_table_optimizers
from rayfm.training.sharding import Sharder, place, sharding_plan
from rayfm.training.trainer import single_process_group

TABLES = ("cut", "whole", "copied")
DIM = 4
IDS = KeyedJaggedTensor(keys=list(TABLES), values=torch.tensor([1, 2, 3]), lengths=torch.ones(3, dtype=torch.int32))


class Sum(nn.Module):
    """Its output is linear in every parameter: each gradient is 1, at every step."""

    def __init__(self) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=8, embedding_dim=DIM, feature_names=[name]) for name in TABLES
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        self.bias = nn.Parameter(torch.zeros(3))
        self.ahead = nn.Parameter(torch.zeros(2))

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        return self.tables(ids).values().sum() + self.bias.sum() + 0.0 * self.ahead.sum()


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with single_process_group():
        yield


def trained(config: TrainingConfig) -> tuple[nn.Module, Optimizers]:
    module = Sum()
    fuse_table_optimizers(module, config, TABLES)
    dmp = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=sharding_plan(module, place(module, config, 1), 1, torch.device("cpu")),
        sharders=[Sharder()],
    )
    with torch.no_grad():
        for value in weights(dmp).values():
            value.zero_()
    parameters = dict(dmp.named_parameters())
    copied = "tables.embedding_bags.copied.weight"
    replicated = {}
    if config.optimizer_of("copied").type == "adam":
        replicated[copied] = (parameters[copied], config.optimizer_of("copied"))
    return dmp, Optimizers(dmp, {"bias": parameters["bias"]}, replicated, {"ahead": parameters["ahead"]}, config)


def weights(dmp: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    for name, value in dmp.state_dict().items():
        if "embedding_bags" in name:
            local = value.to_local() if hasattr(value, "to_local") else value
            shards = local.local_shards() if hasattr(local, "local_shards") else [local]
            found[name.split(".")[-2]] = getattr(shards[0], "tensor", shards[0])
    assert set(found) == set(TABLES)
    return found


def config(kind: str = "sgd", **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "tables": {"type": kind, "lr": 0.5},
            "table_overrides": {"whole": {"type": kind, "lr": 0.25}, "copied": {"type": "adam", "lr": 0.125}},
            "sharding_overrides": {"cut": "row_wise"},
            "dense": {"lr": 0.01},
            **changes,
        }
    )


def moves(training: TrainingConfig, steps: int, first: int = 0) -> list[dict[str, Tensor]]:
    """How far each parameter moves at each step, whose gradients are all 1."""
    dmp, optimizers = trained(training)
    found = []
    for step in range(first, first + steps):
        before = {name: value.clone() for name, value in weights(dmp).items()}
        bias = dmp.module.bias.detach().clone()
        optimizers.begin(step)
        dmp(IDS).backward()
        optimizers.step()
        moved = {name: before[name] - value for name, value in weights(dmp).items()}
        found.append({**moved, "bias": bias - dmp.module.bias.detach()})
    return found


def assert_moved(table: Tensor, row: int, by: float) -> None:
    expected = torch.zeros_like(table)
    expected[row] = by
    torch.testing.assert_close(table, expected, rtol=1e-4, atol=1e-7)


def test_each_table_steps_at_its_own_rate():
    for moved in moves(config(), steps=2):
        assert_moved(moved["cut"], 1, 0.5)
        assert_moved(moved["whole"], 2, 0.25)
        assert_moved(moved["copied"], 3, 0.125)
        torch.testing.assert_close(moved["bias"], torch.full((3,), 0.01), rtol=1e-4, atol=1e-7)


def test_the_warm_up_scales_the_very_step_that_it_is_for():
    """The fused rate is captured in the forward: a late one would make step 0 full and every other lag by one."""
    factors = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for moved, factor in zip(moves(config(warmup_steps=4), steps=6), factors, strict=True):
        assert_moved(moved["cut"], 1, 0.5 * factor)
        assert_moved(moved["whole"], 2, 0.25 * factor)
        assert_moved(moved["copied"], 3, 0.125 * factor)
        torch.testing.assert_close(moved["bias"], torch.full((3,), 0.01 * factor), rtol=1e-4, atol=1e-7)


def test_the_warm_up_goes_on_where_a_run_resumes():
    (moved,) = moves(config(warmup_steps=4), steps=1, first=2)
    assert_moved(moved["cut"], 1, 0.5 * 0.75)
    torch.testing.assert_close(moved["bias"], torch.full((3,), 0.01 * 0.75), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["adagrad", "rowwise_adagrad"])
def test_adagrad_divides_by_the_root_of_the_squares_so_far(kind):
    """With gradients of 1 (so with a row's mean square of 1) the sum after step t is t."""
    for step, moved in enumerate(moves(config(kind, warmup_steps=2), steps=3), 1):
        factor = min(1.0, step / 2) / step**0.5
        assert_moved(moved["cut"], 1, 0.5 * factor)
        assert_moved(moved["whole"], 2, 0.25 * factor)


def test_no_warm_up_is_the_whole_rate_at_once():
    optimizers = trained(config())[1]
    assert [optimizers.warmup(step) for step in (0, 1, 100)] == [1.0, 1.0, 1.0]


def test_what_learns_ahead_has_an_optimiser_of_its_own():
    dmp, optimizers = trained(config(warmup_steps=2))
    optimizers.begin(0)
    (dmp(IDS) + dmp.module.ahead.sum()).backward()
    optimizers.step()
    assert (dmp.module.ahead == 0).all(), "the student's step leaves it alone"
    optimizers.ahead.step()
    torch.testing.assert_close(dmp.module.ahead.detach(), torch.full((2,), -0.005), rtol=1e-4, atol=1e-7)


def test_a_checkpoint_holds_the_state_of_all():
    dmp, optimizers = trained(config("rowwise_adagrad"))
    optimizers.init_state()
    for step in range(2):
        optimizers.begin(step)
        dmp(IDS).backward()
        optimizers.step()
    state = optimizers.combined().state_dict()["state"]
    owners = {key for key in state if state[key]}
    for part in ("cut.weight", "whole.weight", "copied.weight", "bias", "ahead"):
        assert any(part in key for key in owners), part


def test_an_override_for_an_unknown_table_is_refused():
    for changes in ({"table_overrides": {"hole": {"lr": 1.0}}}, {"sharding_overrides": {"hole": "row_wise"}}):
        with pytest.raises(ConfigError, match=r"override for table 'hole', which is not in the schema; did you mean"):
            fuse_table_optimizers(Sum(), config(**changes), TABLES)


def test_an_override_may_be_for_the_table_of_another_model_of_the_group():
    fuse_table_optimizers(Sum(), config(table_overrides={"others": {"lr": 1.0}}), (*TABLES, "others"))
