"""What makes training on a CPU faster and does not change what is learned: kernels of the tables, no denormals.

Row-wise Adagrad of tables goes by the one of fbgemm's kernels that is fast on this processor.

fbgemm has two kernels for it. A table that one feature reads goes through generated code, which mixes SSE and AVX
instructions in the loop over rows; a processor that pays for each change between them takes half a microsecond a row.
A table that several features share goes through compiled code, which does not. So a table is shown to the backward as
shared with a feature that has no ids: the same rows, gradients and order of summation, and another kernel.

Tables whose rows are not pooled (sequences) have a third kernel, of nested hash maps. Here they are bags of one id
each, which go where all bags go.

Gradients that fade fall below 1e-38, where floats lose digits and processors their speed: a product of matrices with
many of them took 1.8 times as long. A step takes them as 0.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rayfm.training.allocator import keep_freed_memory

log = logging.getLogger(__name__)

BAG = "split_embedding_backward_codegen_rowwise_adagrad_cpu"
SEQUENCE = "split_embedding_nobag_backward_codegen_rowwise_adagrad_cpu"

PROBE_ROWS, PROBE_WIDTH, TRIES = 2048, 16, 5
"""Of the table whose update is timed, each row once: some milliseconds in all."""
WORTH = 1.1
"""How many times the compiled code's time the generated code must take to be left: two timings differ by per cents."""

_SUM = 0
"""fbgemm's number of sum pooling."""
_DENORMAL = 5e-324


class _Kernels:
    """fbgemm's own kernels, and ours in their place.

    Raises:
        RuntimeError: fbgemm has no such operators.
    """

    def __init__(self) -> None:
        self.own = {name: torch.library.get_kernel(f"fbgemm::{name}", "CPU") for name in (BAG, SEQUENCE)}
        self.active = True
        self.library = torch.library.Library("fbgemm", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a kernel already
            for name, kernel in ((BAG, self.bags), (SEQUENCE, self.sequences)):
                self.library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
        self.shared = False
        self.shared = self._generated_is_slow()

    def bags(self, keys: Any, *args: Any) -> None:
        """Bags: backward of the pooled look-up and the rows' update, in place, with the operator's own arguments."""
        if self.active and self.shared:
            args = as_shared(args)
        self.own[BAG].call_boxed(keys, *args)

    def sequences(self, keys: Any, *args: Any) -> None:
        """Sequences: as `bags`, of the look-up that does not pool."""
        if not self.active:
            self.own[SEQUENCE].call_boxed(keys, *args)
            return
        for bags in as_bags(args):
            self.bags(keys, *bags)

    def _generated_is_slow(self) -> bool:
        """Whether the compiled code is faster here, timed."""
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        seconds = {}
        for shared in (False, True):
            self.shared = shared
            found = []
            for _ in range(TRIES):
                arguments = _probe()
                started = time.perf_counter()
                self.bags(keys, *arguments)
                found.append(time.perf_counter() - started)
            seconds[shared] = min(found)
        ratio = seconds[False] / seconds[True]
        slow = ratio > WORTH
        log.info("row-wise Adagrad by fbgemm's %s code (%.2g)", "compiled" if slow else "generated", ratio)
        return slow


_kernels: _Kernels | None = None


def train_fast_here() -> None:
    """Let this process' row-wise Adagrad on the CPU take the kernels that are faster here, timed at the first call, and
    let the process keep what it frees."""
    global _kernels
    if _kernels is None:
        _kernels = _Kernels()
    keep_freed_memory()


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """This thread takes floats below 1e-38 as 0 inside, and does as before afterwards: others compute in it too."""
    before = _flushes(_DENORMAL)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes(denormal: float) -> bool:
    return denormal * 1.0 == 0.0


@contextmanager
def as_without() -> Iterator[None]:
    """This process as if `train_fast_here` had not been called, but for kept memory; for comparison."""
    if _kernels is None:
        yield
        return
    _kernels.active = False
    try:
        yield
    finally:
        _kernels.active = True


def as_shared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The bags operator's arguments with a second feature, which has no ids, at each table that one feature reads.

    Shape letters: F features, G features afterwards, B bags of a feature.
    """
    gradient, weights, placements, weight_starts_F, columns_F1, widest, rows_F1, bits, ids, offsets, *rest = args
    features = weight_starts_F.numel()
    if not features or not ids.numel():
        return args
    bags = (offsets.numel() - 1) // features
    # Features of one table stand side by side and begin at the same row.
    new_table_F1 = torch.ones(features + 1, dtype=torch.bool)
    new_table_F1[1:features] = rows_F1[1:features] != rows_F1[: features - 1]
    alone_F = new_table_F1[:-1] & new_table_F1[1:]
    of_G = torch.arange(features).repeat_interleave(1 + alone_F.long())
    empty_G = torch.zeros(len(of_G), dtype=torch.bool)
    empty_G[1:] = of_G[1:] == of_G[:-1]
    starts_GB = offsets[:-1].view(features, bags)[of_G]
    starts_GB[empty_G] = offsets[bags::bags][of_G[empty_G]].unsqueeze(1)
    # The columns of an empty feature are nobody's: it begins where the one before it ends.
    columns_G = torch.where(empty_G, columns_F1[of_G + 1], columns_F1[of_G])
    pooling, id_weights, rounding, momentum, momentum_placements, momentum_starts_F, *last = rest
    return (
        gradient,
        weights,
        placements[of_G],
        weight_starts_F[of_G],
        torch.cat([columns_G, columns_F1[-1:]]),
        widest,
        torch.cat([rows_F1[of_G], rows_F1[-1:]]),
        bits,
        ids,
        torch.cat([starts_GB.view(-1), offsets[-1:]]),
        pooling,
        id_weights,
        rounding,
        momentum,
        momentum_placements[of_G],
        momentum_starts_F[of_G],
        *last,
    )


def as_bags(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The arguments of the sequences' operator as those of the bags', a table at a time: each id is a bag."""
    gradient_ND, weights, placements, weight_starts_F, width, rows_F1, bits, ids_N, offsets, *rest = args
    rounding, momentum, momentum_placements, momentum_starts_F, rate, *last = rest
    features = weight_starts_F.numel()
    if not features:
        return
    bags = (offsets.numel() - 1) // features
    bounds, first_rows = offsets[::bags].tolist() if bags else [0] * (features + 1), rows_F1.tolist()
    first = 0
    while first < features:
        stop = first + 1
        while stop < features and first_rows[stop] == first_rows[first]:
            stop += 1
        ids = ids_N[bounds[first] : bounds[stop]]
        own = slice(first, first + 1)
        if len(ids):
            yield (
                gradient_ND[bounds[first] : bounds[stop]],
                weights,
                placements[own],
                weight_starts_F[own],
                torch.tensor([0, width], dtype=torch.int32),
                width,
                torch.tensor([first_rows[first], first_rows[stop]]),
                bits,
                ids,
                torch.arange(len(ids) + 1, dtype=ids.dtype),
                _SUM,
                None,
                rounding,
                momentum,
                momentum_placements[own],
                momentum_starts_F[own],
                rate,
                *last,
            )
        first = stop


def _probe() -> tuple[Any, ...]:
    """Arguments of the bags' operator for one table, one feature and bags of one id."""
    whole, one = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    ids = torch.arange(PROBE_ROWS)
    return (
        torch.full((PROBE_ROWS, PROBE_WIDTH), 1e-3),
        torch.full((PROBE_ROWS * PROBE_WIDTH,), 1e-2),
        one,
        whole,
        torch.tensor([0, PROBE_WIDTH], dtype=torch.int32),
        PROBE_WIDTH,
        torch.tensor([0, PROBE_ROWS]),
        PROBE_ROWS.bit_length(),
        ids,
        torch.arange(PROBE_ROWS + 1),
        _SUM,
        None,
        False,
        torch.full((PROBE_ROWS,), 1e-3),
        one,
        whole,
        torch.tensor(0.01),
        1e-8,
    )
