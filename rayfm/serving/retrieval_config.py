"""What a two-tower retrieves, as a config says it. Imports neither torch nor FAISS."""

from __future__ import annotations

from pydantic import Field, model_validator

from rayfm.config import Config
from rayfm.serving.item_index import IndexConfig


class RetrievalConfig(Config):
    """Which items a two-tower retrieves, and how."""

    item: str | None = None
    """The feature whose value a reply names items by; by default the item tower's only feature of kind sparse."""
    catalogue: str | None = None
    """Parquet file or folder with a row an item: the columns of the item tower's features. By default the distinct
    items of the example store's latest periods."""
    periods: int = Field(7, ge=1)
    """How many periods, where there is no catalogue."""
    weights: dict[str, float] = {}
    """Task -> its weight in a request that names no task: items are ranked by the weighted sum of calibrated logits.
    By default the first task alone."""
    max_k: int = Field(1000, ge=1, le=10_000)
    """Most items of a reply."""
    index: IndexConfig = IndexConfig()

    @model_validator(mode="after")
    def _weighs_something(self) -> RetrievalConfig:
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights: all are 0; give one task another, or leave them out")
        return self
