"""On which of a cluster's nodes each kind of work runs."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from rayfm.config.base import Config

_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"([a-z0-9.-]{{1,253}}/)?{_NAME}")
_VALUE = re.compile(rf"!?({_NAME}|in\(\s*{_NAME}(\s*,\s*{_NAME})*\s*\))")


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """The selector, if Ray can read it.

    Raises:
        ValueError: it cannot, with the label.
    """
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no node label; one is name or domain/name, at most 63 characters of the name")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"label {key!r}: {value!r} is no selector; give a value, !value, in(a, b) or !in(a, b)")
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(check_labels)]
"""Ray's label selector: label -> value, ``!value``, ``in(a, b)`` or ``!in(a, b)``. Empty: any node."""


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node with these labels is one that Ray would choose: one without a label is not any of its values."""
    for key, wanted in selector.items():
        without = wanted.startswith("!")
        text = wanted.removeprefix("!")
        values = [value.strip() for value in text[3:-1].split(",")] if text.startswith("in(") else [text]
        if (labels.get(key) in values) == without:
            return False
    return True


class NodesConfig(Config):
    """Labels of the nodes for each kind of work, as Ray Data, Train and Serve understand them; by default any node.

    Nodes get labels from ``ray start --labels``, KubeRay's ``labels`` of a worker group, or ``labels`` of a node type
    in a ``ray up`` file.
    """

    data: NodeLabels = {}
    """Preparing, reading ahead (``reader: ray_data``), and the tasks that send rows to the teachers' services."""
    training: NodeLabels = {}
    """Trainers' workers. A trainer's own ``nodes`` takes its place."""
    serving: NodeLabels = {}
    """Replicas of teachers and endpoints, consumers of the near-line queue."""
