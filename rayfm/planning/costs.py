"""The equations of the step's times: pure functions of bytes, operations and rates. All times are in seconds.

Sources: a roofline (Williams et al. 2009) for what one device does; for collectives the bandwidth terms of NCCL's tests
(nccl-tests, PERFORMANCE.md): a ring moves (W - 1) / W of the bytes over the slowest link, an all-reduce twice.
"""

from __future__ import annotations

import math


def moved(size: float, bandwidth: float, efficiency: float = 1.0) -> float:
    """Time of ``size`` bytes over ``bandwidth`` bytes/s, of which a share is got.

    Example::

        >>> moved(1e9, 1e11, 0.5)
        0.02
    """
    return size / (bandwidth * efficiency)


def computed(flops: float, peak: float, efficiency: float = 1.0) -> float:
    """Time of ``flops`` operations at ``peak`` operations/s, of which a share is got."""
    return flops / (peak * efficiency)


def elementwise_bytes(operations: float, width: int) -> float:
    """Bytes that elementwise operations move: two operands in and one result out, ``width`` bytes each."""
    return 3 * width * operations


def cache_hits(share: float, skew: float) -> float:
    """Share of the look-ups that find their row in a cache of the most frequent ``share`` of the rows.

    The k-th most frequent of n ids comes in proportion to k to the power of -``skew`` (Zipf's law); below an exponent
    of 1 the sums are near their integrals, n^(1 - skew) / (1 - skew), whose ratio depends on the share alone.

    Example::

        >>> cache_hits(0.25, 0.5)
        0.5
    """
    return float(share ** (1 - skew))


def all_to_all(size: float, world: int, per_node: int, nvlink: float, network: float) -> float:
    """Time of an all-to-all in which a device exchanges ``size`` bytes with the ``world - 1`` others, evenly.

    The share for its own node goes over NVLink while the rest goes over the network: the slower of both counts.

    Args:
        size: bytes that the busiest device sends or receives, without what it keeps.
        world: devices.
        per_node: devices of a node.
        nvlink: bytes/s in a node, one direction.
        network: bytes/s of a device to other nodes, one direction.
    """
    if world == 1:
        return 0.0
    near = (min(per_node, world) - 1) / (world - 1)
    return max(size * near / nvlink, size * (1 - near) / network)


def ring(size: float, world: int, per_node: int, nvlink: float, network: float) -> float:
    """Time of a reduce-scatter of ``size`` bytes a device, or of an all-gather that ends with as many.

    Each device's link carries (W - 1) / W of the bytes; between nodes the ring runs once per network card of a node,
    so that they add up.
    """
    if world == 1:
        return 0.0
    slowest = nvlink if world <= per_node else min(nvlink, per_node * network)
    return size * (world - 1) / world / slowest


def all_reduce(size: float, world: int, per_node: int, nvlink: float, network: float) -> float:
    """Time of an all-reduce of ``size`` bytes: a reduce-scatter and an all-gather."""
    return 2 * ring(size, world, per_node, nvlink, network)


def start_up(collectives: int, world: int, hop: float) -> float:
    """Time that collectives take beside their bytes: ``hop`` seconds for each doubling of the ranks."""
    return collectives * hop * math.log2(world) if world > 1 else 0.0
