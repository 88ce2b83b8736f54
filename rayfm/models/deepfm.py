"""DeepFM: a factorization machine and an MLP over the same embeddings.

Source: Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017,
arXiv 1703.04247, Eq. 1 to 4.

Shape letters: B examples, F embedded features, E embedding dimension, D dense features, T tasks, H representation.
"""

from __future__ import annotations

from typing import Literal

import torch

from rayfm.data.batch import Batch
from rayfm.models.backbone import DeepConfig
from rayfm.models.base import MODELS, Model, ModelOutput
from rayfm.models.embeddings import flat_inputs, select_features
from rayfm.models.fm import FactorizationTerms, ProductHeads
from rayfm.models.heads import TaskHeads
from rayfm.models.mlp import per_task
from rayfm.models.scaling import Widths
from rayfm.schema import Schema


@MODELS.register("deepfm")
class DeepFM(Model):
    """The logit is the FM's plus a head's on the MLP; both read one set of embeddings.

    The representation is the MLP's last layer, the FM's pairwise vector and its linear terms side by side.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(Feature(name="user", kind="sparse"), Feature(name="video", kind="sparse")),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> model = DeepFM(DeepFM.Config(embedding_dim=8, hidden=(32, 16)), schema, tasks=("click",))
        >>> output = model(synthetic_batch(schema, rows=4))
        >>> output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 25]), torch.Size([4]))
    """

    class Config(DeepConfig):
        """Sizes of a DeepFM."""

        type: Literal["deepfm"] = "deepfm"
        hidden: Widths = (256, 128)
        """Widths of the MLP, which the tasks' heads read."""

    def __init__(
        self,
        config: Config,
        schema: Schema,
        tasks: tuple[str, ...],
        *,
        embedding_device: torch.device | None = None,
    ) -> None:
        super().__init__(config, schema, tasks)
        features = select_features(schema, config.features)
        dim = config.embedding_dim
        self.terms = FactorizationTerms(schema, features, len(tasks), dim, embedding_device, config.histories)
        in_dim = self.terms.factors.num_features * dim + self.terms.dense.num_features
        self.deep = config.mlp(in_dim, config.hidden)
        self.product_heads = ProductHeads(dim, len(tasks))
        self.heads = TaskHeads(self.deep.out_dim, tasks, config.head, config.multi_task)
        self.representation_dim = self.deep.out_dim + dim + len(tasks)

    def forward(self, batch: Batch) -> ModelOutput:
        embeddings_BFE, pairwise_BE, linear_BT = self.terms(batch)
        deep_BH = self.deep(flat_inputs(embeddings_BFE, self.terms.dense(batch)))
        machine = per_task(self.product_heads(pairwise_BE) + linear_BT, self.tasks)
        return ModelOutput(torch.cat([deep_BH, pairwise_BE, linear_BT], dim=1).float(), self.heads(deep_BH, machine))
