"""The TorchRec loop that one would write by hand: collections, sharding, fused row-wise Adagrad, ``for batch in``.

Nothing of rayfm but its encoder, which made the batches before the clock starts: ids hashed to the same rows.
"""

from __future__ import annotations

import itertools

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.others.cases import Case, Sizes
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.schema import Schema
from rayfm.training.config import TrainingConfig
from rayfm.training.cpu_kernels import as_without

LINEAR_DIM = 4
"""Width of the linear weights' tables, of which one column is read: fbgemm's fused tables need a multiple of 4."""


def collection(schema: Schema, dim: int) -> EmbeddingBagCollection:
    """A table for each sparse feature."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature.name}",
            embedding_dim=dim,
            num_embeddings=schema.tables[feature.table_name].rows,
            feature_names=[feature.name],
            pooling=PoolingType.MEAN if feature.is_list else PoolingType.SUM,
        )
        for feature in schema.features
        if feature.kind != "dense"
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear and ReLU by turns."""
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(widths):
        layers += [nn.Linear(one, other), nn.ReLU()]
    return nn.Sequential(*layers)


class PlainDCNv2(nn.Module):
    """The parallel structure (Wang et al. 2021)."""

    def __init__(self, schema: Schema, sizes: Sizes) -> None:
        super().__init__()
        self.bags = collection(schema, sizes.embedding_dim)
        inputs = sum(sizes.embedding_dim if feature.kind != "dense" else 1 for feature in schema.features)
        self.crosses = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(sizes.cross_layers))
        self.deep = mlp([inputs, *sizes.hidden])
        self.head = nn.Linear(inputs + sizes.hidden[-1], 1)

    def forward(self, dense_BD: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        x0_BI = torch.cat([self.bags(ids).values(), dense_BD], dim=1)
        x_BI = x0_BI
        for cross in self.crosses:
            x_BI = x0_BI * cross(x_BI) + x_BI
        return self.head(torch.cat([x_BI, self.deep(x0_BI)], dim=1)).squeeze(1)


class PlainDeepFM(nn.Module):
    """Embeddings for the machine and the MLP, linear weights in tables of their own (Guo et al. 2017)."""

    def __init__(self, schema: Schema, sizes: Sizes) -> None:
        super().__init__()
        self.bags = collection(schema, sizes.embedding_dim)
        self.weights = collection(schema, LINEAR_DIM)
        self.dim, dense = sizes.embedding_dim, sum(feature.kind == "dense" for feature in schema.features)
        self.dense_weights_D = nn.Parameter(torch.zeros(dense))
        self.dense_factors_DE = nn.Parameter(torch.randn(dense, self.dim) * 0.01)
        self.deep = mlp([(len(schema.features) - dense) * self.dim + dense, *sizes.hidden])
        self.head = nn.Linear(sizes.hidden[-1], 1)

    def forward(self, dense_BD: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        flat = self.bags(ids).values()
        linear_B = self.weights(ids).values().view(len(dense_BD), -1, LINEAR_DIM)[:, :, 0].sum(1)
        factors_BFE = flat.view(len(dense_BD), -1, self.dim)
        if dense_BD.shape[1]:
            linear_B = linear_B + dense_BD @ self.dense_weights_D
            factors_BFE = torch.cat([factors_BFE, dense_BD.unsqueeze(2) * self.dense_factors_DE], dim=1)
        pairs_B = 0.5 * (factors_BFE.sum(1).square() - factors_BFE.square().sum(1)).sum(1)
        return linear_B + pairs_B + self.head(self.deep(torch.cat([flat, dense_BD], dim=1))).squeeze(1)


MODELS = {"dcnv2": PlainDCNv2, "deepfm": PlainDeepFM}

Held = tuple[Tensor, KeyedJaggedTensor, Tensor]
"""Dense features, ids and labels of a batch."""


def in_memory(case: Case, period: str) -> list[Held]:
    """All batches of a period."""
    store, encoder = ExampleStore(case.folder / "store"), Encoder(case.schema)
    plan = ReadPlan(store, tuple(encoder.columns), case.sizes.batch)
    return [(batch.dense, batch.sparse, batch.labels[:, 0]) for batch in ArrowReader(plan, encoder).batches(period)]


class PlainLoop:
    """A model, sharded by TorchRec's own plan, and its batches."""

    def __init__(self, case: Case, model: str, seed: int, training: TrainingConfig) -> None:
        torch.manual_seed(seed)
        module = MODELS[model](case.schema, case.sizes)
        for part in module.modules():
            if isinstance(part, EmbeddingBagCollection):
                optimizer = {"lr": training.tables.lr, "eps": training.tables.eps}
                apply_optimizer_in_backward(RowWiseAdagrad, part.parameters(), optimizer)
        # Without DDP around the rest: there is one process.
        self.model = DistributedModelParallel(
            module, device=torch.device("cpu"), sharders=[EmbeddingBagCollectionSharder()], init_data_parallel=False
        )
        tables = set(self.model.fused_optimizer.params)
        for name, table in self.model.fused_optimizer.params.items():
            nn.init.normal_(table.detach(), std=0.0 if name.startswith("weights") else 0.01)
        others = [parameter for name, parameter in self.model.named_parameters() if name not in tables]
        self.adam = torch.optim.Adam(others, lr=training.dense.lr, foreach=True)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16")
        self.batches, self.held_out = (in_memory(case, period) for period in case.periods)

    def train(self) -> float:
        """One pass, with fbgemm's and torch's kernels as they come. Returns its rows."""
        with as_without():
            return self._train()

    def _train(self) -> float:
        self.model.train()
        rows = 0
        for dense_BD, ids, labels_B in self.batches:
            self.adam.zero_grad(set_to_none=True)
            with self.autocast:
                logits_B = self.model(dense_BD, ids)
            loss = functional.binary_cross_entropy_with_logits(logits_B.float(), labels_B)
            loss.backward()
            self.adam.step()
            rows += len(labels_B)
        return rows

    @torch.no_grad()
    def score(self) -> float:
        """AUC on the held-out rows."""
        self.model.eval()
        with self.autocast:
            logits = torch.cat([self.model(dense_BD, ids).float() for dense_BD, ids, _ in self.held_out])
        return float(roc_auc_score(torch.cat([labels for _, _, labels in self.held_out]), logits))
