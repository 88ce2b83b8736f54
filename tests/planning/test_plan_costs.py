from __future__ import annotations

import pytest

from rayfm.planning import costs


def test_bytes_over_a_share_of_the_bandwidth():
    # 6 GB at 60% of 2000 GB/s: 6e9 / 1.2e12.
    assert costs.moved(6e9, 2000e9, 0.6) == pytest.approx(0.005)


def test_operations_over_a_share_of_the_peak():
    # 4e12 operations at 40% of 100 TFLOP/s: a tenth of a second.
    assert costs.computed(4e12, 100e12, 0.4) == pytest.approx(0.1)


def test_elementwise_operations_read_two_operands_and_write_one():
    assert costs.elementwise_bytes(10, 2) == 60


def test_all_to_all_is_bound_by_the_slower_kind_of_link():
    # 4 devices in nodes of 2: of 30 bytes, 1/3 stays in the node (10 at 5/s: 2 s), 2/3 leaves it (20 at 4/s: 5 s).
    assert costs.all_to_all(30, world=4, per_node=2, nvlink=5, network=4) == pytest.approx(5)
    # With a fast network the node's own links count.
    assert costs.all_to_all(30, world=4, per_node=2, nvlink=5, network=100) == pytest.approx(2)
    # One node has no network.
    assert costs.all_to_all(30, world=4, per_node=4, nvlink=5, network=1e-9) == pytest.approx(6)
    assert costs.all_to_all(30, world=4, per_node=8, nvlink=5, network=1e-9) == pytest.approx(6)


def test_a_ring_moves_all_but_one_share_over_the_slowest_link():
    # 4 devices in nodes of 2: 3/4 of 80 bytes; between nodes 2 cards of 4 bytes/s are 8, below NVLink's 10.
    assert costs.ring(80, world=4, per_node=2, nvlink=10, network=4) == pytest.approx(60 / 8)
    assert costs.ring(80, world=4, per_node=2, nvlink=10, network=50) == pytest.approx(60 / 10)
    assert costs.ring(80, world=4, per_node=4, nvlink=10, network=1e-9) == pytest.approx(60 / 10)
    assert costs.all_reduce(80, world=4, per_node=2, nvlink=10, network=4) == pytest.approx(15)


def test_one_device_talks_to_nobody():
    assert costs.all_to_all(30, world=1, per_node=8, nvlink=5, network=4) == 0
    assert costs.all_reduce(30, world=1, per_node=8, nvlink=5, network=4) == 0
    assert costs.start_up(3, world=1, hop=1.0) == 0


def test_collectives_start_in_as_many_hops_as_the_ranks_double():
    assert costs.start_up(3, world=16, hop=0.5) == pytest.approx(3 * 4 * 0.5)
