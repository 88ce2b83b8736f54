"""Row-wise Adagrad on a CPU, whichever of fbgemm's kernels makes it, against its definition."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from rayfm.training import cpu_kernels

ROWS, WIDTH, BAGS, STEPS = (40, 7, 25), 8, 32, 6
RATE, EPS = 0.1, 1e-8
ALONE, MIXED = (0, 1, 2), (0, 0, 1, 2, 2, 2)
"""The table of each feature."""


@pytest.fixture(params=["compiled", "generated"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu_kernels.train_fast_here()
    kernels = cpu_kernels._kernels
    assert kernels is not None
    before, kernels.shared = kernels.shared, request.param == "compiled"
    yield request.param
    kernels.shared = before


def tables(features: tuple[int, ...], pooling: PoolingMode) -> SplitTableBatchedEmbeddingBagsCodegen:
    torch.manual_seed(3)
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=list(features),
        optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE,
        eps=EPS,
        pooling_mode=pooling,
    )
    made.init_embedding_weights_uniform(-1, 1)
    return made


def state(made: SplitTableBatchedEmbeddingBagsCodegen) -> list[npt.NDArray[np.float64]]:
    """Each table's weights, then each table's sums of squares, both copied."""
    sums = [value for (value,) in made.split_optimizer_states()]
    return [value.detach().double().numpy().copy() for value in (*made.split_embedding_weights(), *sums)]


def step(
    features: tuple[int, ...], generator: torch.Generator, longest: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, offsets and weights of a batch; the first feature has an empty bag at its end, the last one no ids."""
    counts = torch.randint(0, longest, (len(features), BAGS), generator=generator)
    counts[0, -1] = 0
    counts[-1] = 0
    ids = [
        torch.randint(0, ROWS[table], (int(own.sum()),), generator=generator)
        for table, own in zip(features, counts, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.view(-1).cumsum(0)])
    return torch.cat(ids), offsets, torch.rand(int(counts.sum()), generator=generator)


def defined(
    tables_and_sums: list[npt.NDArray[np.float64]],
    features: tuple[int, ...],
    ids: torch.Tensor,
    offsets: torch.Tensor,
    gradient_of: npt.NDArray[np.float64],
) -> None:
    """The optimiser's definition, in place: a row's sum grows by the mean square of its gradient, which is then
    divided by the root of the sum."""
    count = len(ROWS)
    summed = [np.zeros((rows, WIDTH)) for rows in ROWS]
    for feature, table in enumerate(features):
        for place in range(int(offsets[feature * BAGS]), int(offsets[(feature + 1) * BAGS])):
            summed[table][int(ids[place])] += gradient_of[place]
    for table, gradient in enumerate(summed):
        for row in np.unique(np.nonzero(gradient)[0]):
            sums = tables_and_sums[count + table].reshape(-1)
            sums[row] += (gradient[row] ** 2).mean()
            tables_and_sums[table][row] -= RATE / (np.sqrt(sums[row]) + EPS) * gradient[row]


@pytest.mark.parametrize("features", [ALONE, MIXED], ids=["alone", "mixed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_updated_as_defined(kernel: str, features: tuple[int, ...], weighted: bool) -> None:
    made, generator = tables(features, PoolingMode.SUM), torch.Generator().manual_seed(5)
    expected = state(made)
    for _ in range(STEPS):
        ids, offsets, weights = step(features, generator)
        pooled = made(ids, offsets, weights if weighted else None)
        gradient = torch.randn(pooled.shape, generator=generator)
        pooled.backward(gradient)
        of_bag = gradient.double().numpy().reshape(BAGS, len(features), WIDTH).transpose(1, 0, 2).reshape(-1, WIDTH)
        each = np.repeat(of_bag, np.diff(offsets.numpy()), axis=0)
        defined(expected, features, ids, offsets, each * weights.double().numpy()[:, None] if weighted else each)
    for found, wanted in zip(state(made), expected, strict=True):
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("features", [ALONE, MIXED], ids=["alone", "mixed"])
def test_sequences_are_updated_as_defined(kernel: str, features: tuple[int, ...]) -> None:
    made, generator = tables(features, PoolingMode.NONE), torch.Generator().manual_seed(5)
    expected = state(made)
    for _ in range(STEPS):
        ids, offsets, _ = step(features, generator)
        rows = made(ids, offsets)
        gradient = torch.randn(rows.shape, generator=generator)
        rows.backward(gradient)
        defined(expected, features, ids, offsets, gradient.double().numpy())
    for found, wanted in zip(state(made), expected, strict=True):
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.NONE])
def test_a_batch_without_ids_changes_nothing(kernel: str, pooling: PoolingMode) -> None:
    made = tables(ALONE, pooling)
    before = state(made)
    out = made(torch.zeros(0, dtype=torch.int64), torch.zeros(len(ALONE) * BAGS + 1, dtype=torch.int64))
    out.backward(torch.ones_like(out))
    for found, wanted in zip(state(made), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.NONE])
def test_it_is_what_fbgemm_alone_does(kernel: str, pooling: PoolingMode) -> None:
    def trained() -> list[npt.NDArray[np.float64]]:
        made, generator = tables(MIXED, pooling), torch.Generator().manual_seed(7)
        for _ in range(STEPS):
            ids, offsets, _ = step(MIXED, generator)
            out = made(ids, offsets)
            out.backward(torch.randn(out.shape, generator=generator))
        return state(made)

    ours = trained()
    with cpu_kernels.as_without():
        theirs = trained()
    for found, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def test_only_tables_that_one_feature_reads_get_a_second_one() -> None:
    rows = torch.tensor([0, 0, 40, 47, 47, 47, 72])  # cumulative, of MIXED
    features = len(MIXED)
    offsets = torch.arange(features * 2 + 1)
    numbers = torch.arange(features, dtype=torch.int32)
    args = (
        torch.zeros(2, features * WIDTH),
        torch.zeros(1),
        numbers,
        numbers.long() * 10,
        torch.arange(features + 1, dtype=torch.int32) * WIDTH,
        WIDTH,
        rows,
        7,
        torch.zeros(features * 2, dtype=torch.int64),
        offsets,
        0,
        None,
        False,
        torch.zeros(1),
        numbers,
        numbers.long(),
        "rate",
    )
    found = cpu_kernels.as_shared(args)
    assert found[2].tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert found[4].tolist() == [0, 8, 16, 24, 24, 32, 40, 48]
    assert found[6].tolist() == [0, 0, 40, 40, 47, 47, 47, 72]
    assert found[9].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 8, 9, 10, 11, 12]
    assert found[16] == "rate"


def test_denormals_are_taken_as_zero_inside_alone() -> None:
    small = torch.tensor([1e-30])
    with cpu_kernels.denormals_as_zero():
        assert float(small * 1e-10) == 0.0
        with cpu_kernels.denormals_as_zero():
            pass
        assert float(small * 1e-10) == 0.0
    assert float(small * 1e-10) > 0.0
