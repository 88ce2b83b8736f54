"""Label selectors of nodes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

from rayfm.config.nodes import NodesConfig, matches

READ = [
    {"rayfm.io/role": "training"},
    {"accelerator": "!H100"},
    {"ray.io/accelerator-type": "in(A100, H100)"},
    {"zone": "!in(us-east-1a,us-east-1b)"},
    {},
]


@pytest.mark.parametrize("labels", READ)
def test_what_is_taken_is_what_ray_takes(labels: dict[str, str]) -> None:
    assert NodesConfig(training=labels).training == labels
    assert validate_label_selector(labels) is None


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"role of mine": "data"}, "'role of mine' is no node label"),
        ({"a/b/c": "data"}, "'a/b/c' is no node label"),
        ({"role": "data or training"}, "label 'role': 'data or training' is no selector"),
        ({"role": "in(a b)"}, "label 'role'"),
        ({"role": ""}, "label 'role'"),
    ],
)
def test_what_is_not_is_refused_with_the_label(labels: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        NodesConfig(data=labels)


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ({}, ["plain", "spot", "large"]),
        ({"kind": "spot"}, ["spot"]),
        ({"kind": "!spot"}, ["plain", "large"]),
        ({"kind": "in(spot, large)"}, ["spot", "large"]),
        ({"kind": "!in(spot,large)"}, ["plain"]),
        ({"kind": "in(spot, large)", "zone": "a"}, ["large"]),
    ],
)
def test_selectors_choose_the_nodes_that_ray_would(selector: dict[str, str], found: list[str]) -> None:
    nodes = {"plain": {"zone": "a"}, "spot": {"kind": "spot"}, "large": {"kind": "large", "zone": "a"}}
    assert [name for name, labels in nodes.items() if matches(selector, labels)] == found
