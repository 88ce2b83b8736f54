"""Two towers: a user vector and an item vector whose inner product is the logit, so that items can be indexed.

Sources: Huang et al., Learning Deep Structured Semantic Models for Web Search, CIKM 2013; Yi et al., Sampling-Bias-
Corrected Neural Modeling for Large Corpus Item Recommendations, RecSys 2019, section 3 (normalisation, temperature);
He et al., Neural Collaborative Filtering, WWW 2017, section 3.4 (products beside an MLP of both vectors, for the top).

Shape letters: B examples, F embedded features, E embedding dimension, V width of the towers' vectors, T tasks,
H representation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rayfm.config import ConfigError
from rayfm.data.batch import Batch
from rayfm.models.backbone import DeepConfig
from rayfm.models.base import MODELS, Model, ModelOutput
from rayfm.models.embeddings import DenseFeatures, FeatureEmbeddings, select_features
from rayfm.models.fm import ProductHeads
from rayfm.models.heads import TaskHeads
from rayfm.models.mlp import MLP, per_task
from rayfm.models.scaling import Width, Widths
from rayfm.schema import Schema


class Tower(nn.Module):
    """One side: its features of the shared look-up through an MLP to a vector: ``-> [B, V]``, float32.

    Args:
        names: the tower's features and histories.
        embedded: names of all embedded features, in the order of the look-up.
        dense: names of all dense features, in the order of their columns.
        config: the model's config.
    """

    def __init__(
        self, names: set[str], embedded: tuple[str, ...], dense: tuple[str, ...], config: TwoTower.Config
    ) -> None:
        super().__init__()
        self._embedded = [position for position, name in enumerate(embedded) if name in names]
        self._dense = [position for position, name in enumerate(dense) if name in names]
        self._normalize = config.normalize
        in_dim = len(self._embedded) * config.embedding_dim + len(self._dense)
        self.mlp = config.mlp(in_dim, config.hidden)
        self.output = nn.Linear(self.mlp.out_dim, config.vector_dim)

    def forward(self, embeddings: tuple[Tensor, ...], dense: tuple[Tensor, ...]) -> Tensor:
        """``embeddings`` holds F tensors ``[B, E]``, ``dense`` D tensors ``[B]``.

        Split tensors, as the gradient of indexing one tensor by a list takes several times as long.
        """
        columns = [embeddings[position] for position in self._embedded]
        columns += [dense[position].unsqueeze(1) for position in self._dense]
        x_BI = torch.cat(columns, dim=1)
        vector_BV: Tensor = self.output(self.mlp(x_BI)).float()
        return functional.normalize(vector_BV, dim=1) if self._normalize else vector_BV


@MODELS.register("two_tower")
class TwoTower(Model):
    """A user vector and an item vector, with an inner product or an MLP on top.

    The top ``dot`` is ``z_t = sum_v (user * item)_v a_tv / temperature + b_t``. With one task, a = 1: a plain inner
    product. With several, each task weighs the coordinates; multiplied into the user's vector, that gives the task's
    query against the same item vectors. The representation is the products before their sum, H = V.

    The top ``mlp`` reads user vector, item vector and their product, ``[B, 3 V]``; its last layer is the representation
    that the tasks' heads read. Its logit is no inner product, so items cannot be indexed for retrieval: it is for
    stages that score given candidates, where vectors may still be computed once and kept.

    Features that neither tower's list names (the context) go to the user tower; a history goes where its key is. One
    look-up serves both towers, so that a table may be shared between them (the item's id and the items that the user
    watched).

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=100), "video": Table(rows=100)},
        ...     features=(Feature(name="user", kind="sparse"), Feature(name="video", kind="sparse")),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> model = TwoTower(TwoTower.Config(item_features=("video",), vector_dim=8), schema, tasks=("click",))
        >>> batch = synthetic_batch(schema, rows=4)
        >>> user_BV, item_BV = model.vectors(batch)
        >>> output = model(batch)
        >>> user_BV.shape, output.representation.shape, output.logits["click"].shape
        (torch.Size([4, 8]), torch.Size([4, 8]), torch.Size([4]))
    """

    class Config(DeepConfig):
        """Sizes of the towers and who reads what."""

        type: Literal["two_tower"] = "two_tower"
        item_features: tuple[str, ...] = Field(min_length=1)
        """The item tower's features."""
        user_features: tuple[str, ...] = ()
        """The user tower's features; those in neither list join them."""
        hidden: Widths = (256, 128)
        """Widths of each tower's hidden layers."""
        vector_dim: Width = 64
        """V."""
        normalize: bool = False
        """Vectors of length one; then take a temperature of 0.05 to 0.2."""
        temperature: float = Field(1.0, gt=0)
        """What the inner product is divided by, of the top ``dot``."""
        top: Literal["dot", "mlp"] = "dot"
        """What turns the vectors into logits. Items can be indexed under ``dot`` alone."""
        top_hidden: Widths = ()
        """Widths of the top ``mlp``; by default one layer, as wide as a vector."""

        @model_validator(mode="after")
        def _apart(self) -> TwoTower.Config:
            both = sorted(set(self.item_features) & set(self.user_features))
            if both:
                raise ValueError(f"feature {both[0]!r} is in both towers; name it in one")
            return self

        @model_validator(mode="after")
        def _of_the_top(self) -> TwoTower.Config:
            others = ("head", "multi_task", "top_hidden") if self.top == "dot" else ("temperature",)
            for key in others:
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"top {self.top!r} has no {key!r}; leave it out, or take the other top")
            return self

        def check(self, schema: Schema, tasks: tuple[str, ...]) -> None:
            super().check(schema, tasks)
            features = select_features(schema, self.features)
            for names in (self.item_features, self.user_features):
                outside = [
                    feature.name for feature in select_features(schema, names or None) if feature not in features
                ]
                if names and outside:
                    raise ConfigError(f"two_tower: {outside[0]!r} is in a tower but not in 'features'; add it there")
            if all(feature.name in self.item_features for feature in features):
                raise ConfigError("two_tower: the user tower has no feature; leave one out of 'item_features'")

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
        names = {feature.name for feature in features} | {history.name for history in config.histories}
        # A history belongs to the side that knows its key.
        item = {h.name for h in config.histories if h.key in config.item_features} | set(config.item_features)
        self.embeddings = FeatureEmbeddings(
            schema, features, config.embedding_dim, histories=config.histories, device=embedding_device
        )
        self.dense = DenseFeatures(schema, features)
        self.user = Tower(names - item, self.embeddings.names, self.dense.names, config)
        self.item = Tower(item, self.embeddings.names, self.dense.names, config)
        self.temperature = config.temperature
        self.top: MLP | None = None
        self.heads: ProductHeads | TaskHeads
        if config.top == "dot":
            self.representation_dim = config.vector_dim
            self.heads = ProductHeads(config.vector_dim, len(tasks))
        else:
            self.top = config.mlp(3 * config.vector_dim, config.top_hidden or (config.vector_dim,))
            self.representation_dim = self.top.out_dim
            self.heads = TaskHeads(self.representation_dim, tasks, config.head, config.multi_task)

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """User and item vectors, each ``[B, V]``."""
        embeddings, dense = self.embeddings(batch).unbind(dim=1), self.dense(batch).unbind(dim=1)
        return self.user(embeddings, dense), self.item(embeddings, dense)

    def forward(self, batch: Batch) -> ModelOutput:
        user_BV, item_BV = self.vectors(batch)
        products_BV = user_BV * item_BV
        if self.top is not None:
            representation_BH = self.top(torch.cat([user_BV, item_BV, products_BV], dim=1)).float()
            return ModelOutput(representation_BH, self.heads(representation_BH))
        logits_BT = self.heads(products_BV / self.temperature)
        return ModelOutput(products_BV, per_task(logits_BT, self.tasks))
