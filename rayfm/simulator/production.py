"""The production models of the cascade, trained on earlier impressions: two towers, a small MLP, a larger MLP.

Every model splits into a request part and an ad part that are computed once per request and once per ad; only what
combines the two runs per candidate. For an MLP that is exact: its first layer is a sum over both sides.

Shape letters: N rows, R requests, A ads, F categorical features of a side, D dense features of a side, H width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rayfm.simulator.config import ProductionConfig
from rayfm.simulator.world import Floats, Ints


@contextlib.contextmanager
def single_thread(seed: int) -> Iterator[None]:
    """One torch thread and a seeded generator inside; both as before outside. Sums then never change their order."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


@dataclasses.dataclass
class Side:
    """What a model reads of requests or of ads."""

    ids: Ints
    """Categorical features ``[N, F]``, each column in ``[0, rows of its table)``."""
    dense: Floats
    """``[N, D]``, scaled to about unit size."""

    def __getitem__(self, rows: Ints | npt.NDArray[np.bool_]) -> Side:
        return Side(self.ids[rows], self.dense[rows])


@dataclasses.dataclass
class Impressions:
    """N labelled rows, with their features as they were when they were shown."""

    requests: Side
    ads: Side
    click: Floats
    """``[N]``."""

    @classmethod
    def join(cls, parts: Sequence[Impressions]) -> Impressions:
        """The rows of ``parts``, one after the other."""

        def side(name: str) -> Side:
            sides = [getattr(part, name) for part in parts]
            return Side(np.concatenate([each.ids for each in sides]), np.concatenate([each.dense for each in sides]))

        return cls(side("requests"), side("ads"), np.concatenate([part.click for part in parts]))

    def tensors(self) -> list[Tensor]:
        """Request ids and dense, ad ids and dense, clicks; ``[N, ...]`` each."""
        arrays = (self.requests.ids, self.requests.dense, self.ads.ids, self.ads.dense, self.click)
        return [torch.from_numpy(array) for array in arrays]


class _Encoder(nn.Module):
    """Embeddings and dense features of one side -> ``[N, H]``, linear or with a hidden layer."""

    def __init__(self, tables: tuple[int, ...], dense: int, embedding_dim: int, width: int, hidden: int = 0) -> None:
        super().__init__()
        offsets = np.concatenate([[0], np.cumsum(tables)[:-1]])
        self.register_buffer("offsets", torch.from_numpy(offsets.astype(np.int64)))
        self.offsets: Tensor
        self.embedding = nn.Embedding(sum(tables), embedding_dim)
        nn.init.normal_(self.embedding.weight, std=0.1)
        inputs = len(tables) * embedding_dim + dense
        layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, width)] if hidden else []
        self.net = nn.Sequential(*layers) if hidden else nn.Linear(inputs, width)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        embedded = self.embedding(ids + self.offsets).flatten(1)
        encoded: Tensor = self.net(torch.cat([embedded, dense], 1))
        return encoded


class ProductionModel(nn.Module):
    """One stage's model of the probability of a click.

    Args:
        request_tables, ad_tables: rows of the tables of each side's categorical features.
        request_dense, ad_dense: dense features of each side.
        width: H, what each side is encoded to.
        hidden: widths of the layers over the sum of both sides; empty for two towers, whose score is a dot product.
    """

    def __init__(
        self,
        request_tables: tuple[int, ...],
        ad_tables: tuple[int, ...],
        request_dense: int,
        ad_dense: int,
        width: int,
        hidden: tuple[int, ...],
        config: ProductionConfig,
    ) -> None:
        super().__init__()
        self.config, self.towers = config, not hidden
        tower_hidden = 2 * width if self.towers else 0
        extra = 1 if self.towers else 0  # a tower's last output is its own bias
        self.request = _Encoder(request_tables, request_dense, config.embedding_dim, width + extra, tower_hidden)
        self.ad = _Encoder(ad_tables, ad_dense, config.embedding_dim, width + extra, tower_hidden)
        sizes = (width, *hidden[1:], 1)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
        self.top = nn.Sequential(*layers) if hidden else nn.Identity()
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.slope, self.shift = 1.0, 0.0
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )

    def combine(self, request: Tensor, ad: Tensor) -> Tensor:
        """Logits ``[N]`` of encoded requests ``[N, H]`` and encoded ads ``[N, H]``."""
        if self.towers:
            return (request[:, :-1] * ad[:, :-1]).sum(1) + request[:, -1] + ad[:, -1] + self.bias
        logits: Tensor = self.top(request + ad).squeeze(1)
        return logits + self.bias

    def fit(self, impressions: Impressions, seed: int) -> float:
        """Train in shuffled batches, continuing from where the last period ended.

        Args:
            impressions: of earlier periods.
            seed: of the shuffling.

        Returns:
            Mean loss of the last pass.
        """
        columns = impressions.tensors()
        rows = len(impressions.click)
        generator = torch.Generator().manual_seed(seed)
        loss_sum = 0.0
        for _ in range(self.config.passes):
            loss_sum = 0.0
            for batch in torch.randperm(rows, generator=generator).split(self.config.batch_size):
                request_ids, request_dense, ad_ids, ad_dense, click = (column[batch] for column in columns)
                logits = self.combine(self.request(request_ids, request_dense), self.ad(ad_ids, ad_dense))
                loss = nn.functional.binary_cross_entropy_with_logits(logits, click)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                loss_sum += float(loss.detach()) * len(batch)
        return loss_sum / max(1, rows)

    @torch.no_grad()
    def calibrate(self, impressions: Impressions) -> None:
        """Fit the calibrator (Platt scaling) on impressions that the model was not trained on."""
        request_ids, request_dense, ad_ids, ad_dense, _ = impressions.tensors()
        logits = self.combine(self.request(request_ids, request_dense), self.ad(ad_ids, ad_dense))
        self.slope, self.shift = platt(logits.double().numpy(), impressions.click)

    @torch.no_grad()
    def predict(self, requests: Side, ads: Side, pool: Ints, chunk: int = 1 << 16) -> Floats:
        """Probabilities of a click for candidates of R requests.

        Args:
            requests: R rows.
            ads: A rows.
            pool: ``[R, C]`` positions in ``ads``.
            chunk: candidates that go through at a time.

        Returns:
            ``[R, C]`` float32.
        """
        request = self.request(torch.from_numpy(requests.ids), torch.from_numpy(requests.dense))
        ad = self.ad(torch.from_numpy(ads.ids), torch.from_numpy(ads.dense))
        positions = torch.from_numpy(pool)
        width = pool.shape[1]
        probability = torch.empty(pool.shape)
        step = max(1, chunk // width)
        for start in range(0, len(pool), step):
            part = positions[start : start + step]
            row = torch.arange(start, start + len(part)).repeat_interleave(width)
            logits = self.combine(request[row], ad[part.reshape(-1)])
            calibrated = torch.sigmoid(self.slope * logits + self.shift)
            probability[start : start + step] = calibrated.view(len(part), width)
        result: Floats = probability.numpy()
        return result


def platt(logit: npt.NDArray[np.float64], label: Floats, prior: float = 100.0, steps: int = 25) -> tuple[float, float]:
    """Slope and shift that make ``sigmoid(slope * logit + shift)`` most likely, by Newton's method.

    Args:
        logit: ``[N]``.
        label: ``[N]`` in {0, 1}.
        prior: weight of a normal prior around slope 1, shift 0, so that few clicks move them little.
        steps: of Newton's method.
    """
    inputs = np.stack([logit, np.ones_like(logit)], 1)
    centre = np.array([1.0, 0.0])
    fitted = centre
    for _ in range(steps):
        probability = 1 / (1 + np.exp(-np.einsum("np,p->n", inputs, fitted)))
        spread = probability * (1 - probability)
        gradient = np.einsum("np,n->p", inputs, probability - label) + prior * 0.01 * (fitted - centre)
        curvature = np.einsum("np,nq,n->pq", inputs, inputs, spread) + prior * 0.01 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        fitted = fitted - step
        if np.abs(step).max() < 1e-8:
            break
    return float(fitted[0]), float(fitted[1])
