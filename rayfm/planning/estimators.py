"""TorchRec's estimate of a shard's time, made once for each size."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import ShardEstimator, ShardingOption, Topology


class OncePerSize(ShardEstimator):  # type: ignore[misc]  # torchrec has no types
    """What ``EmbeddingPerfEstimator`` says, asked once for the shards of a table that have one size.

    A shard's estimate depends on its size alone, and a row-wise table has a shard a rank: of 26 tables on 2,048 ranks
    there are 53,000 estimates, and 52 different ones.
    """

    def __init__(self, topology: Topology, constraints: Any = None) -> None:
        self._whole = EmbeddingPerfEstimator(topology=topology, constraints=constraints)

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        every = [option.shards for option in sharding_options]
        first = [{tuple(shard.size): shard for shard in reversed(shards)} for shards in every]
        for option, distinct in zip(sharding_options, first, strict=True):
            option.shards = list(distinct.values())
        self._whole.estimate(sharding_options, sharder_data_map=sharder_data_map)
        for option, shards, distinct in zip(sharding_options, every, first, strict=True):
            option.shards = shards
            for shard in shards:
                shard.perf = distinct[tuple(shard.size)].perf
