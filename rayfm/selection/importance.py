"""UKDSL Algorithm 1: a feature's importance is what shuffling it in a batch adds to the loss.

Shape letters: F features, N batches, S shuffles, B rows of a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from rayfm.config import DataError

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def batch_bounds(rows: int, batch_size: int, most: int | None = None) -> list[tuple[int, int]]:
    """Consecutive batches of ``rows``, equally large but for one row: as many as have ``batch_size`` rows or more.

    A short last batch would be shuffled among few rows, and count as much as the others; so there is none, and no row
    is left out. Fewer rows than a batch are one batch.

    Args:
        rows: of the lane.
        batch_size: fewest rows of a batch.
        most: batches to take, spread evenly; by default all.
    """
    if rows == 0:
        return []
    count = max(1, rows // batch_size)
    edges = [rows * position // count for position in range(count + 1)]
    bounds = list(itertools.pairwise(edges))
    if most is None or most >= count:
        return bounds
    return [bounds[position * count // most] for position in range(most)]


def shuffle_orders(seed: int, place: tuple[str | int, ...], shuffles: int, rows: int) -> Int64:
    """Permutations of a batch's rows, ``[S, B]``: they depend on the seed and on the batch's place alone, so that a
    work item that is scored again gives the same numbers, on whatever machine.

    All features of a batch share them: each is perturbed by itself, and differences between features are then not of
    the shuffles.
    """
    entropy = [seed, *(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in place)]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    return np.stack([generator.permutation(rows) for _ in range(shuffles)]).astype(np.int64)


def loss_changes(
    loss: Callable[[str | None, Int64 | None], float], features: Sequence[str], orders_SB: Int64
) -> tuple[float, Float64]:
    """Algorithm 1 on one batch: the original loss, and each feature's loss changes ``[F, S]``.

    "1. Measure the original loss with feature, 2. random shuffle feature values in the batch, 3. measure the loss on
    the shuffled batch, 4. report feature importance as loss change." The change is (shuffled - original), so that more
    is more important; the original loss is the same for all features, and is measured once. Where the paper is silent:
    a feature is shuffled S times, and a shuffle may leave rows where they are.

    Args:
        loss: of the batch with a feature's rows in an order; (None, None): as it is.
        features: what to perturb, one at a time.
        orders_SB: permutations of the rows.
    """
    original = loss(None, None)
    changes_FS = np.array([[loss(feature, order_B) - original for order_B in orders_SB] for feature in features])
    return original, changes_FS.reshape(len(features), len(orders_SB))


@dataclasses.dataclass(frozen=True)
class Importance:
    """The features' importance on one kind of examples."""

    features: tuple[str, ...]
    mean: Float64
    """``[F]``: mean loss change over batches and shuffles."""
    deviation: Float64
    """``[F]``: standard deviation of the loss change over batches and shuffles."""
    error: Float64
    """``[F]``: standard error of the mean, over batches (a batch's shuffles share its rows, and are averaged first)."""
    loss: float
    """Mean loss as it is."""
    batches: int
    """N."""
    rows: int

    @property
    def ranks(self) -> Int64:
        """``[F]``: 1 for the most important; of equal ones the first comes first."""
        ranks = np.empty(len(self.features), np.int64)
        ranks[np.argsort(-self.mean, kind="stable")] = np.arange(1, len(self.features) + 1)
        return ranks

    @property
    def relative(self) -> Float64:
        """``[F]``: the mean as a share of the loss."""
        return self.mean / self.loss


def summarise(features: tuple[str, ...], changes_FNS: Float64, losses_N: Float64, rows: int) -> Importance:
    """ "Report mean & stdev for feature importance": over batches, which weigh alike, and shuffles.

    Raises:
        DataError: fewer than two batches have no deviation.
    """
    batches = changes_FNS.shape[1]
    if batches < 2:
        raise DataError(
            f"importance is measured on {batches} batch of {rows} rows, and its deviation needs two; lower "
            "select.batch_size or withhold more periods"
        )
    flat = changes_FNS.reshape(len(features), -1)
    return Importance(
        features=features,
        mean=flat.mean(axis=1),
        deviation=flat.std(axis=1, ddof=1),
        error=changes_FNS.mean(axis=2).std(axis=1, ddof=1) / math.sqrt(batches),
        loss=float(losses_N.mean()),
        batches=batches,
        rows=rows,
    )


def matters(importance: Importance, threshold: float, sigmas: float) -> npt.NDArray[np.bool_]:
    """``[F]``: whether importance exceeds ``threshold`` (a share of the loss) by ``sigmas`` standard errors.

    The paper does not say how many features are taken, and a top k always finds k: a feature of pure noise has a mean
    of zero, give or take its error, and is no feature at any k.
    """
    return importance.mean - sigmas * importance.error > threshold * importance.loss
