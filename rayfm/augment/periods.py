"""The periods that labelled examples are written by."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa

from rayfm.augment.rules import Group, Int64, Rules
from rayfm.data.store import period_name


def period_of(start_us: int, length_us: int) -> str:
    """The name of the period that begins at ``start_us``."""
    start = datetime.datetime.fromtimestamp(start_us / 1e6, datetime.UTC)
    return period_name(start, datetime.timedelta(microseconds=length_us))


def period_names(times_N: Int64, length_us: int) -> pa.Array:
    """The name of each time's period: string ``[N]``."""
    numbers, place = np.unique(times_N // length_us, return_inverse=True)
    names = pa.array([period_of(int(number) * length_us, length_us) for number in numbers], pa.string())
    return names.take(pa.array(place))


def is_complete(rules: Rules, group: Group, start_us: int, watermark: int) -> bool:
    """Whether the period that begins at ``start_us`` gets no further example of ``group``.

    The windows of its impressions have closed, and a late one would be refused.
    """
    return watermark >= start_us + rules.period_us + max(group.window_us, rules.lateness_us)
