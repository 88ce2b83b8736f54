"""A teacher's representation as an input: what it thought of an entity's past examples (LoopFM, arXiv 2605.29280).

The teacher is not asked when a request comes: what its label jobs stored of earlier periods is summed up per entity,
and looked up by the entity's id, like any feature that a feature store keeps.

Shape letters: B examples, V histories, R width of a teacher's representation, E embedding dimension.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rayfm.config import Config, ConfigError, nearest
from rayfm.data.batch import Batch
from rayfm.schema import Schema


class HistoryFeature(Config):
    """The decayed average of a teacher's representations over an entity's impressions of earlier periods."""

    teacher: str
    """The teacher; it must store its representation (``store_representation: true``)."""
    key: str
    """The sparse feature that tells entities apart, such as the user's id."""
    decay: float = Field(0.9, gt=0, le=1)
    """What an impression counts for after one more period."""
    positives_of: str | None = None
    """A binary task: only its positives count, as in a history of clicks. By default all impressions do."""
    width: int | None = Field(None, gt=0)
    """R; by default that of the teacher's model in this config."""

    @property
    def name(self) -> str:
        """The column of a request, or of a batch, that holds the average: ``history/<teacher>/<key>``."""
        return f"history/{self.teacher}/{self.key}"

    def check(self, schema: Schema) -> None:
        """Refuse a key or a task that the schema does not have so.

        Raises:
            ConfigError: naming the key.
        """
        sparse = [feature.name for feature in schema.features if feature.kind == "sparse"]
        if self.key not in sparse:
            raise ConfigError(f"{self.name}: key {self.key!r} is no sparse feature{nearest(self.key, sparse)}")
        binary = [task.name for task in schema.tasks if task.kind == "binary"]
        if self.positives_of is not None and self.positives_of not in binary:
            known = nearest(self.positives_of, binary)
            raise ConfigError(f"{self.name}: positives_of {self.positives_of!r} is no binary task{known}")


class HistoryEmbeddings(nn.Module):
    """Histories as embeddings: ``Batch -> [B, V, E]``.

    ``v = P (h / rms(h))`` with a projection P of each history h of its own; an entity without one has a learned vector
    in its place. Only h's direction goes in, since its length says how long ago the entity was seen and how sure the
    teacher was, in units that change from one version to the next.

    Args:
        histories: what to read; each has a width.
        embedding_dim: E.
        init_std: standard deviation of the projections' first values: the tables', so that neither drowns the other.

    Raises:
        ConfigError: a history has no width, or stands twice.

    Example::

        >>> from rayfm.models.synthetic import synthetic_batch
        >>> from rayfm.schema import Feature, Schema, Table, Task
        >>> schema = Schema(
        ...     tables={"user": Table(rows=10)},
        ...     features=(Feature(name="user", kind="sparse"),),
        ...     tasks=(Task(name="click"),),
        ... )
        >>> histories = HistoryEmbeddings((HistoryFeature(teacher="big", key="user", width=32),), 8, init_std=0.01)
        >>> histories(synthetic_batch(schema, rows=5)).shape
        torch.Size([5, 1, 8])
    """

    def __init__(self, histories: tuple[HistoryFeature, ...], embedding_dim: int, init_std: float) -> None:
        super().__init__()
        self.names = tuple(history.name for history in histories)
        for history in histories:
            if history.width is None:
                raise ConfigError(f"{history.name}: how wide is the representation of {history.teacher!r}? set 'width'")
            if self.names.count(history.name) > 1:
                raise ConfigError(f"histories: {history.name!r} stands twice; name it once")
        self._widths = tuple(history.width or 0 for history in histories)
        self._std = init_std
        self.projections_ER = nn.ParameterList(torch.empty(embedding_dim, width) for width in self._widths)
        self.absent_VE = nn.Parameter(torch.empty(len(histories), embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal projections; zeros for entities without a history."""
        for projection_ER in self.projections_ER:
            nn.init.normal_(projection_ER, std=self._std)
        nn.init.zeros_(self.absent_VE)

    def forward(self, batch: Batch) -> Tensor:
        vectors = []
        for position, (name, projection_ER) in enumerate(zip(self.names, self.projections_ER, strict=True)):
            value_BR, known_B = self._read(batch, name, self._widths[position])
            unit_BR = functional.rms_norm(value_BR, (value_BR.shape[1],), eps=1e-6)
            projected_BE = functional.linear(unit_BR, projection_ER)
            vectors.append(torch.where(known_B.unsqueeze(1), projected_BE, self.absent_VE[position]))
        return torch.stack(vectors, dim=1)

    def _read(self, batch: Batch, name: str, width: int) -> tuple[Tensor, Tensor]:
        """The column ``[B, R]`` and where it is known ``[B]``; nowhere in a batch that has none at all."""
        if batch.representation is None:
            rows = len(batch)
            return batch.dense.new_zeros(rows, width), torch.zeros(rows, dtype=torch.bool, device=batch.dense.device)
        return batch.represented(name)
