"""The short form of the soak; ``make soak`` runs the long one."""

from __future__ import annotations

import pytest
from soak_faults import KINDS, schedule
from soak_run import Plan, soak


def test_faults_follow_from_the_seed():
    assert list(schedule(3, 40, 2.0)) == list(schedule(3, 40, 2.0))
    assert list(schedule(3, 40, 2.0)) != list(schedule(4, 40, 2.0))
    drawn = [fault.kind for fault in schedule(3, 35, 2.0)]
    assert {kind: drawn.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 5)


@pytest.mark.ray
@pytest.mark.timeout(900)  # beside other tests; each recovery in it has a limit of its own
def test_nothing_is_lost_or_doubled_through_twenty_faults(fresh_ray, tmp_path):
    result = soak(tmp_path, Plan())
    assert result["faults"]["injected"] == 20
    assert result["near_line"]["rows"] > 0
    assert result["label_jobs"]["jobs"] > 0
