"""Numbers, sizes and places of replicas, as Ray Serve is told them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from rayfm.serving.replicas import Replicas, Scale

SERVING = {"rayfm.io/role": "serving"}


def test_a_number_that_stays() -> None:
    assert Scale(replicas=3).options() == {"num_replicas": 3}
    assert Scale(replicas=3, max_replicas=3).options() == {"num_replicas": 3}


def test_a_number_that_follows_the_load_is_one_that_serve_takes() -> None:
    scale = Scale(replicas=2, max_replicas=5, target_requests=4, upscale_delay_s=1, downscale_delay_s=60)
    (options,) = scale.options().values()
    config = AutoscalingConfig(**options)
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert config.target_ongoing_requests == 4
    assert (config.upscale_delay_s, config.downscale_delay_s) == (1, 60)


def test_fewer_at_most_than_at_least() -> None:
    with pytest.raises(ValidationError, match="max_replicas 1 is less than replicas 2"):
        Scale(replicas=2, max_replicas=1)


def test_a_replica_is_placed_alone_and_a_gang_whole() -> None:
    alone = Replicas(cpus=0.5, gpus=1, nodes=SERVING)
    assert alone.placement() == {"ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1, "label_selector": SERVING}}
    assert (alone.whole_cpus, alone.whole_gpus) == (0.5, 1)
    gang = Replicas(replicas=2, cpus=0.25, members=2, member_cpus=1, member_gpus=1, nodes=SERVING)
    assert gang.placement() == {
        "ray_actor_options": {"num_cpus": 0.25, "num_gpus": 0},
        "placement_group_bundles": [{"CPU": 0.25}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}],
        "placement_group_strategy": "PACK",
        "placement_group_bundle_label_selector": [SERVING] * 3,
    }
    assert (gang.whole_cpus, gang.whole_gpus) == (2.25, 2)
    assert gang.terms() == "2 x (0.25 + 2 x 1)"
    assert Replicas().placement() == {"ray_actor_options": {"num_cpus": 0.25, "num_gpus": 0}}
