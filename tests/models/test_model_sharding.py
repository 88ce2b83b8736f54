from __future__ import annotations

import logging
import warnings
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from model_batches import SCHEMA, SIZES, TASKS, is_table, random_batch, small_config, small_model
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from rayfm.models import build_model

ROWS = ((24, 24), (24, 7), (24, 0), (0, 5), (0, 0))
"""Rows of each rank, step by step: at the end of a period ranks have other numbers, or none."""


WAYS = ("mixed", "row_wise", "table_wise")
EVERY_WAY = ("deepfm", "dmin")
"""Two sets of pooled collections, and unpooled ones: models look up through no others."""


class Sharder(EmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "data_parallel"]


class SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise"]


def _shard(module: nn.Module, how: str, world: int) -> nn.Module:
    plans = {}
    for path, part in module.named_modules():
        if not isinstance(part, EmbeddingBagCollection | EmbeddingCollection):
            continue
        pooled = isinstance(part, EmbeddingBagCollection)
        kinds = {}
        for position, table in enumerate(part.embedding_bag_configs() if pooled else part.embedding_configs()):
            choices = {"row_wise": row_wise(), "table_wise": table_wise(rank=position % world)}
            if pooled:  # TorchRec cannot replicate the tables of sequences
                choices["data_parallel"] = data_parallel()
            names = list(choices)
            kinds[table.name] = choices[names[position % len(names)] if how == "mixed" else how]
        sharder = Sharder() if pooled else SequenceSharder()
        plans[path] = construct_module_sharding_plan(
            part, kinds, sharder=sharder, world_size=world, local_size=world, device_type="cpu"
        )
    return DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan(plans),
        sharders=[Sharder(), SequenceSharder()],
    )


def _load(sharded: nn.Module, full: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in sharded.state_dict().items():
            if hasattr(value, "local_shards"):
                for shard in value.local_shards():
                    row, column = shard.metadata.shard_offsets
                    height, width = shard.metadata.shard_sizes
                    shard.tensor.copy_(full[name][row : row + height, column : column + width])
            else:
                value.copy_(full[name])


def _compare(rank: int, world: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    batches = [random_batch(rows[rank], seed=rank) for rows in ROWS]
    lines = []
    for kind in sorted(SIZES):
        for how in WAYS if kind in EVERY_WAY else WAYS[:1]:
            plain = small_model(kind)
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
            model = build_model(small_config(kind), SCHEMA, TASKS, embedding_device=torch.device("meta"))
            tables = [value for name, value in model.named_parameters() if is_table(name)]
            _apply_optimizer_in_backward(torch.optim.SGD, tables, {"lr": 0.0})  # else fbgemm steps by itself
            sharded = _shard(model, how, world)
            _load(sharded, plain.state_dict())
            assert sharded.state_dict().keys() == plain.state_dict().keys()
            for batch in batches:
                expected, found = plain(batch), sharded(batch)
                pairs = [(expected.logits[task], found.logits[task]) for task in TASKS]
                pairs.append((expected.representation, found.representation))
                worst = [float((one - other).abs().max()) if one.numel() else 0.0 for one, other in pairs]
                lines.append(f"{kind} {how} {len(batch)} {max(worst)}")
                sum(other.sum() for _, other in pairs).backward()
    Path(folder, f"rank{rank}").write_text("\n".join(lines))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2])
def test_sharded_models_equal_unsharded_ones(tmp_path: Path, world: int) -> None:
    processes.start(_compare, (world, str(tmp_path)), world)
    for rank in range(world):
        lines = (tmp_path / f"rank{rank}").read_text().splitlines()
        assert len(lines) == (len(SIZES) + 2 * len(EVERY_WAY)) * len(ROWS)
        assert not [line for line in lines if float(line.split()[-1]) > 1e-5]
