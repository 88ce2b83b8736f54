from __future__ import annotations

import itertools

import torch
from model_batches import random_batch, small_model
from torchrec.modules.crossnet import VectorCrossNet

from rayfm.models.dcn import VectorCross
from rayfm.models.fm import pairwise_interactions
from rayfm.models.fmfm import FieldMatrices, field_interactions

PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


def test_field_interactions_by_hand() -> None:
    factors = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]]])
    matrices = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    # (v0 M01) * v1 = (5, 0) * (3, 5); (v0 M02 + v1 M12) * v2 = ((0, 1) + (0, 5)) * (7, 11)
    assert field_interactions(factors, matrices).tolist() == [[15.0, 66.0]]


def test_field_interactions_are_all_pairs_with_their_own_matrices() -> None:
    factors, matrices = torch.randn(3, 4, 5), torch.randn(6, 5, 5)
    expected = sum(
        (factors[:, i] @ matrix * factors[:, j]).sum(1) for (i, j), matrix in zip(PAIRS, matrices, strict=True)
    )
    torch.testing.assert_close(field_interactions(factors, matrices).sum(1), expected, rtol=1e-4, atol=1e-4)
    assert not field_interactions(factors[:, :1], matrices[:0]).any()
    assert field_interactions(factors[:, :0], matrices[:0]).shape == (3, 5)


def test_fmfm_starts_as_the_fm() -> None:
    factors = torch.randn(3, 4, 5)
    torch.testing.assert_close(FieldMatrices(4, 5)(factors), pairwise_interactions(factors), rtol=1e-4, atol=1e-4)
    plain, matrixed = small_model("fm"), small_model("fmfm")
    with torch.no_grad():
        for value in plain.parameters():
            value.normal_(std=0.3)
    matrixed.load_state_dict(plain.state_dict() | {"matrices.matrices_PEE": matrixed.matrices.matrices_PEE.detach()})
    batch = random_batch()
    for task, logit in plain(batch).logits.items():
        torch.testing.assert_close(matrixed(batch).logits[task], logit, rtol=1e-4, atol=1e-4)


def test_fmfm_has_a_matrix_for_each_pair_of_fields() -> None:
    model = small_model("fmfm", tasks=("click",), features=("age", "user", "video", "duration"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    batch = random_batch()
    factors = [
        model.terms.factors.bags.embedding_bags[name].weight[batch.sparse[name].values()] for name in ("video", "user")
    ]
    factors += [model.terms.dense_factors.factors_DE[i] * batch.dense[:, [i]] for i in range(2)]
    _, _, linear = model.terms.parts(batch)
    expected = model.heads.bias_T + linear[:, 0]
    for (i, j), matrix in zip(PAIRS, model.matrices.matrices_PEE, strict=True):
        expected = expected + (factors[i] @ matrix * factors[j]).sum(1)
    torch.testing.assert_close(model(batch).logits["click"], expected, rtol=1e-4, atol=1e-3)
    assert set(itertools.combinations(range(4), 2)) == set(PAIRS)


def test_a_vector_cross_by_hand() -> None:
    cross = VectorCross(2)
    with torch.no_grad():
        cross.weight_I.copy_(torch.tensor([1.0, 2.0]))
        cross.bias_I.copy_(torch.tensor([0.5, -0.5]))
    found = cross(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]))
    assert found.tolist() == [[10 * 1 + 0.5 + 2, 10 * 3 - 0.5 + 4]]


def test_vector_crosses_compute_torchrecs() -> None:
    theirs, ours = VectorCrossNet(6, 3), [VectorCross(6) for _ in range(3)]
    for position, layer in enumerate(ours):
        with torch.no_grad():
            layer.bias_I.normal_()
            layer.weight_I.copy_(theirs.kernels[position][:, 0])
            theirs.bias[position].copy_(layer.bias_I.unsqueeze(1))
    x0 = x = torch.randn(5, 6)
    for layer in ours:
        x = layer(x0, x)
    torch.testing.assert_close(x, theirs(x0))
