"""What the log shows of the world: features of requests and ads, and what each production model reads of them.

Nothing here reads the truth: latents are seen through noise, counts and sequences end with the period before.

Shape letters: N rows, R requests, U users, A live ads, L latent dimensions, S traffics.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pyarrow as pa

from rayfm.config import ConfigError, nearest
from rayfm.schema import Schema
from rayfm.simulator.config import SimulatorConfig
from rayfm.simulator.history import History
from rayfm.simulator.production import Side
from rayfm.simulator.requests import Requests
from rayfm.simulator.world import DEVICES, HOURS, Floats, Ints, World, stream

BUCKETS = 4
"""Buckets of one coarsely observed latent; a bucket feature holds two latents."""

TASKS: dict[str, str] = {"click": "binary", "long_view": "binary", "watch_time": "regression"}

_PRIOR_VIEWS, _PRIOR_RATE = 20.0, 0.1
"""Smoothing of click rates: as if so many impressions with this rate had come first."""

Sort = Literal["dense", "sparse", "sequence"]


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """One feature that the simulator can log."""

    kind: Sort
    id_type: Literal["int64", "string"] = "int64"
    side: Literal["request", "ad", "pair"] = "request"
    costly: bool = False
    """Too costly for a model that serves: for teachers."""


def feature_specs(config: SimulatorConfig) -> dict[str, FeatureSpec]:
    """Every feature of the log, by name; those with a surface in their name depend on the config's traffics."""
    pairs = range(config.world.latent_dim // 2)
    specs = {name: FeatureSpec("sparse") for name in ("user_id", "user_segment", "hour", "device")}
    specs |= {f"user_interest_{i}": FeatureSpec("sparse") for i in pairs}
    specs["placement"] = FeatureSpec("sparse", "string")
    specs |= {name: FeatureSpec("sparse", side="ad") for name in ("ad_id", "advertiser_id", "category")}
    specs["campaign"] = FeatureSpec("sparse", "string", "ad")
    specs |= {f"ad_style_{i}": FeatureSpec("sparse", side="ad") for i in pairs}
    specs |= {name: FeatureSpec("dense") for name in ("user_impressions", "user_ctr")}
    specs |= {name: FeatureSpec("dense", side="ad") for name in ("ad_impressions", "ad_ctr", "ad_age", "ad_bid")}
    for i in range(config.world.latent_dim):
        specs[f"user_taste_{i}"] = FeatureSpec("dense", costly=True)
        specs[f"ad_topic_{i}"] = FeatureSpec("dense", side="ad", costly=True)
    for traffic in config.traffics:
        specs[f"user_ctr_{traffic.name}"] = FeatureSpec("dense", costly=True)
        specs[f"ad_ctr_{traffic.name}"] = FeatureSpec("dense", side="ad", costly=True)
    specs["user_category_clicks"] = FeatureSpec("dense", side="pair", costly=True)
    specs["clicked_ads"] = FeatureSpec("sequence", costly=True)
    specs["clicked_categories"] = FeatureSpec("sequence", costly=True)
    return specs


def check_schema(config: SimulatorConfig, schema: Schema) -> None:
    """Refuse a schema that asks for what this world cannot log.

    Raises:
        ConfigError: an unknown feature, task or traffic, or one of another kind.
    """
    specs = feature_specs(config)
    for feature in schema.features:
        spec = specs.get(feature.name)
        if spec is None:
            raise ConfigError(
                f"schema.features: the simulator has no feature {feature.name!r}{nearest(feature.name, list(specs))}"
            )
        if feature.kind != spec.kind or (spec.kind != "dense" and feature.id_type != spec.id_type):
            raise ConfigError(
                f"schema.features: the simulator's {feature.name!r} is {spec.kind} with id_type {spec.id_type}, "
                f"not {feature.kind} with {feature.id_type}"
            )
    for task in schema.tasks:
        if TASKS.get(task.name) != task.kind:
            known = ", ".join(f"{name} ({kind})" for name, kind in TASKS.items())
            raise ConfigError(f"schema.tasks: the simulator has no {task.kind} task {task.name!r}; it has {known}")
    for traffic in config.traffics:
        if traffic.name not in schema.traffics:
            raise ConfigError(
                f"schema.traffics lacks the simulator's traffic {traffic.name!r}"
                f"{nearest(traffic.name, list(schema.traffics))}"
            )


def _rate(clicked: Floats, shown: Floats) -> Floats:
    rate: Floats = (clicked + np.float32(_PRIOR_VIEWS * _PRIOR_RATE)) / (shown + np.float32(_PRIOR_VIEWS))
    return rate


class Observer:
    """The noise through which the log sees the latents; a user's is fixed, an ad's is drawn at its birth."""

    def __init__(self, world: World) -> None:
        self.config = config = world.config
        rng = stream(config.seed, "observe")
        users, ads, latent = config.users, config.ads, config.world.latent_dim
        self._user_fine, self._user_coarse = (rng.standard_normal((users, latent), np.float32) for _ in range(2))
        self._ad_fine, self._ad_coarse = (np.zeros((ads, latent), np.float32) for _ in range(2))
        self._segment_direction = rng.standard_normal((latent, config.segments), np.float32)

    def meet_ads(self, slots: Ints, period: int) -> None:
        """New ads begin at these positions of the catalogue."""
        rng = stream(self.config.seed, "observe", period)
        shape = (len(slots), self.config.world.latent_dim)
        self._ad_fine[slots] = rng.standard_normal(shape, np.float32)
        self._ad_coarse[slots] = rng.standard_normal(shape, np.float32)

    def _buckets(self, coarse: Floats, name: str) -> dict[str, Ints]:
        edges = np.array([-0.67, 0.0, 0.67]) * np.sqrt(1 + self.config.world.coarse_noise**2)
        bucket = np.digitize(coarse, edges)
        pairs = coarse.shape[1] // 2
        return {f"{name}_{i}": bucket[:, 2 * i] * BUCKETS + bucket[:, 2 * i + 1] for i in range(pairs)}

    def observe(self, world: World, history: History, requests: Requests) -> Observation:
        """Features of the world's period, from what was known when it began."""
        noise = self.config.world
        user_coarse = world.user_latent + np.float32(noise.coarse_noise) * self._user_coarse
        user_fine = world.user_latent + np.float32(noise.fine_noise) * self._user_fine
        segment = np.einsum("ul,ls->us", user_coarse, self._segment_direction).argmax(1)
        users = {"user_id": np.arange(self.config.users), "user_segment": segment}
        users |= self._buckets(user_coarse, "user_interest")
        user_dense = {
            "user_impressions": history.user_shown.sum(1),
            "user_ctr": _rate(history.user_clicked.sum(1), history.user_shown.sum(1)),
        }
        user_dense |= {f"user_taste_{i}": user_fine[:, i] for i in range(noise.latent_dim)}

        ad_coarse = world.ad_latent + np.float32(noise.coarse_noise) * self._ad_coarse
        ad_fine = world.ad_latent + np.float32(noise.fine_noise) * self._ad_fine
        ads = {
            "ad_id": world.ad_id,
            "campaign": world.ad_campaign,
            "advertiser_id": world.advertiser_of[world.ad_campaign],
            "category": world.category_of[world.ad_campaign],
        }
        ads |= self._buckets(ad_coarse, "ad_style")
        ad_dense = {
            "ad_impressions": history.ad_shown.sum(1),
            "ad_ctr": _rate(history.ad_clicked.sum(1), history.ad_shown.sum(1)),
            "ad_age": world.ad_age.astype(np.float32),
            "ad_bid": world.ad_bid,
        }
        ad_dense |= {f"ad_topic_{i}": ad_fine[:, i] for i in range(noise.latent_dim)}
        for i, traffic in enumerate(self.config.traffics):
            user_dense[f"user_ctr_{traffic.name}"] = _rate(history.user_clicked[:, i], history.user_shown[:, i])
            ad_dense[f"ad_ctr_{traffic.name}"] = _rate(history.ad_clicked[:, i], history.ad_shown[:, i])

        context = {"hour": requests.hour, "device": requests.device, "placement": requests.traffic}
        user = requests.user
        return Observation(
            config=self.config,
            requests=requests,
            request_columns={
                **{name: values[user] for name, values in users.items()},
                **context,
                **{name: values[user] for name, values in user_dense.items()},
            },
            ad_columns={**ads, **ad_dense},
            category_clicks=history.user_category.copy(),
            sequences={
                "clicked_ads": history.clicked_ads.copy(),
                "clicked_categories": history.clicked_categories.copy(),
            },
        )


@dataclasses.dataclass
class Observation:
    """A period's features, by request and by ad; a row is a request and a position in the catalogue."""

    config: SimulatorConfig
    requests: Requests
    request_columns: dict[str, Ints | Floats]
    """``[R]`` each."""
    ad_columns: dict[str, Ints | Floats]
    """``[A]`` each."""
    category_clicks: Floats
    """Users' earlier clicks by category ``[U, categories]``."""
    sequences: dict[str, Ints]
    """Users' earlier clicks, newest last, -1 in front ``[U, history_length]``."""

    def column(self, name: str, request: Ints, ad: Ints) -> pa.Array:
        """One feature of N rows; ``request`` and ``ad`` are ``[N]`` positions."""
        if name in self.sequences:
            padded = self.sequences[name][self.requests.user[request]]
            known = padded >= 0
            offsets = np.concatenate([[0], np.cumsum(known.sum(1))]).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(padded[known]))
        if name == "user_category_clicks":
            return pa.array(self.category_clicks[self.requests.user[request], self.ad_columns["category"][ad]])
        if name == "placement":
            names = pa.array([traffic.name for traffic in self.config.traffics])
            return names.take(pa.array(self.requests.traffic[request]))
        if name == "campaign":
            names = pa.array([f"campaign-{number}" for number in range(self.config.campaigns)])
            return names.take(pa.array(self.ad_columns["campaign"][ad]))
        if name in self.request_columns:
            return pa.array(self.request_columns[name][request])
        return pa.array(self.ad_columns[name][ad])

    def side(self, part: Literal["request", "ad"], inputs: Inputs) -> Side:
        """What a production model reads of all requests, or of all ads."""
        columns = self.request_columns if part == "request" else self.ad_columns
        names = inputs.request_ids if part == "request" else inputs.ad_ids
        dense = inputs.request_dense if part == "request" else inputs.ad_dense
        rows = len(next(iter(columns.values())))
        ids = np.empty((rows, len(names)), np.int64)
        for place, name in enumerate(names):
            ids[:, place] = columns[name] % table_rows(self.config, name)
        values = np.empty((rows, len(dense)), np.float32)
        for place, name in enumerate(dense):
            raw = columns[name]
            values[:, place] = (
                np.log(raw / np.float32(_PRIOR_RATE)) if name.endswith("_ctr") else np.log1p(raw) / np.float32(3)
            )
        return Side(ids, values)


def table_rows(config: SimulatorConfig, name: str) -> int:
    """Rows of a production model's table of one feature; an ad may share its row with one that ended long before."""
    rows = {
        "user_id": config.users,
        "user_segment": config.segments,
        "hour": HOURS,
        "device": DEVICES,
        "placement": len(config.traffics),
        "ad_id": 4 * config.ads,
        "campaign": config.campaigns,
        "advertiser_id": config.advertisers,
        "category": config.categories,
    }
    return rows.get(name, BUCKETS * BUCKETS)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The features that a production model reads; a later stage reads more."""

    request_ids: tuple[str, ...]
    ad_ids: tuple[str, ...]
    request_dense: tuple[str, ...] = ()
    ad_dense: tuple[str, ...] = ()


def production_inputs(config: SimulatorConfig) -> dict[str, Inputs]:
    """Stage -> what its production model reads. None reads a costly feature."""
    pairs = range(config.world.latent_dim // 2)
    interests, styles = tuple(f"user_interest_{i}" for i in pairs), tuple(f"ad_style_{i}" for i in pairs)
    request, ad = ("user_segment", "placement", "device"), ("category", "advertiser_id", "ad_id")
    return {
        "retrieval": Inputs((*request, *interests[:1]), (*ad, *styles[:1])),
        "early": Inputs((*request, *interests[:2]), (*ad, *styles[:2]), ("user_ctr",), ("ad_ctr", "ad_age")),
        "ranking": Inputs(
            (*request, "hour", *interests),
            (*ad, "campaign", *styles),
            ("user_ctr", "user_impressions"),
            ("ad_ctr", "ad_age", "ad_impressions"),
        ),
    }
