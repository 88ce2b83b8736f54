"""The sums of a calibrator on counts stay within their bound, and so does what a batch needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rayfm.export.aggregated import fit_platt_aggregated
from rayfm.export.aggregated_sums import MAX_BINS, MAX_SUMS, AggregatedSums
from rayfm.training.calibration import MAX_CELLS


@pytest.mark.parametrize("cells", [1, 12, 1302, 20_833, 20_834, MAX_CELLS])
def test_they_stay_within_their_bound(cells: int) -> None:
    sums = AggregatedSums((), cells)
    assert 3 * cells * sums.bins <= MAX_SUMS
    assert 20 <= sums.bins <= MAX_BINS


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made inside, apart from views of ``known``."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.elements = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.known:
            self.elements = max(self.elements, made.numel())
        return made


def test_a_batch_makes_nothing_of_their_size() -> None:
    sums = AggregatedSums(("click",), 1000)
    logit, cell, weight = torch.randn(50), torch.arange(50), torch.ones(50)
    with Largest(sums._sums) as largest:
        sums.update("click", logit, cell, weight)
    assert largest.elements == 50
    assert float(sums._sums[0, 0].sum()) == 50


def test_the_coarsest_bins_fit_as_the_rows_do() -> None:
    generator = torch.Generator().manual_seed(0)
    cell = torch.randint(0, MAX_CELLS, (200_000,), generator=generator)
    logit = torch.randn(200_000, generator=generator) + torch.randn(MAX_CELLS, generator=generator)[cell] - 3
    label = torch.bernoulli(torch.sigmoid(0.7 * logit + 0.5), generator=generator)
    sums = AggregatedSums(("click",), MAX_CELLS)
    sums.update("click", logit, cell, torch.ones(200_000))
    sums.count("click", cell, label, torch.ones(200_000))
    expected = fit_platt_aggregated(logit, cell, sums.counts[0])
    assert sums.fit({})["click"] == pytest.approx(expected, abs=1e-3)
