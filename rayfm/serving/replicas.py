"""How many processes answer, what each has, and where they run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from rayfm.config import Config
from rayfm.config.nodes import NodeLabels

LOOK_BACK_S = 15.0
"""Seconds over which requests are averaged: half of Serve's default, above the ten seconds after which each replica and
handle tells what it has."""


def selector(nodes: NodeLabels) -> dict[str, Any]:
    """``ray_actor_options`` for nodes of these labels."""
    return {"label_selector": nodes} if nodes else {}


class Scale(Config):
    """How many replicas of a deployment run, and on which nodes."""

    replicas: int = Field(1, ge=1)
    """Replicas that always run."""
    max_replicas: int | None = Field(None, ge=1)
    """With more than ``replicas``, replicas come and go with the requests that run and wait."""
    target_requests: float = Field(2.0, gt=0)
    """Requests, running and waiting, a replica that Ray Serve's autoscaler aims at."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds for which more have to come before a replica is added."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Seconds for which fewer have to come before a replica is taken away; it answers what it has first."""
    nodes: NodeLabels = {}
    """Labels of the nodes that replicas run on; none named: those of ``ray.nodes.serving``."""

    @model_validator(mode="after")
    def _range(self) -> Scale:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        return self

    def options(self) -> dict[str, Any]:
        """Options of ``serve.deployment``."""
        if self.max_replicas is None or self.max_replicas == self.replicas:
            return {"num_replicas": self.replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_requests,
                "upscale_delay_s": self.upscale_delay_s,
                "downscale_delay_s": self.downscale_delay_s,
                "look_back_period_s": LOOK_BACK_S,
            }
        }


class Replicas(Scale):
    """A teacher's replicas."""

    cpus: float = Field(0.25, gt=0)
    gpus: float = Field(0.0, ge=0)
    members: int = Field(1, ge=1)
    """Above 1, each replica is a gang of so many processes over which the teacher's tables are sharded: for a teacher
    that one worker cannot hold."""
    member_cpus: float = Field(0.25, gt=0)
    member_gpus: float = Field(0.0, ge=0)
    row_wise_from: int = Field(1_000_000, ge=1)
    """Rows from which on a gang cuts a table over all its members; smaller ones lie whole on one."""

    def gang(self) -> dict[str, Any]:
        """What `rayfm.serving.gang.GangConfig` has of them."""
        return {
            "members": self.members,
            "cpus_per_member": self.member_cpus,
            "gpus_per_member": self.member_gpus,
            "row_wise_from": self.row_wise_from,
        }

    @property
    def whole_cpus(self) -> float:
        """CPUs of a replica with its members."""
        return self.cpus + (self.members * self.member_cpus if self.members > 1 else 0.0)

    @property
    def whole_gpus(self) -> float:
        """GPUs of a replica with its members."""
        return self.gpus + (self.members * self.member_gpus if self.members > 1 else 0.0)

    def terms(self, replicas: int | None = None) -> str:
        """Replicas (by default those that always run) times CPUs, as errors show it."""
        gang = f"({self.cpus:g} + {self.members} x {self.member_cpus:g})" if self.members > 1 else f"{self.cpus:g}"
        return f"{self.replicas if replicas is None else replicas} x {gang}"

    def placement(self) -> dict[str, Any]:
        """Options of ``serve.deployment``: what a replica reserves, and where."""
        actor: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.members == 1:
            return {"ray_actor_options": {**actor, **selector(self.nodes)}}
        own = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        member = {"CPU": self.member_cpus, **({"GPU": self.member_gpus} if self.member_gpus else {})}
        bundles = [own] + [member] * self.members
        placed: dict[str, Any] = {"placement_group_bundles": bundles, "placement_group_strategy": "PACK"}
        if self.nodes:
            placed["placement_group_bundle_label_selector"] = [self.nodes] * len(bundles)
        return {"ray_actor_options": actor, **placed}
