"""The base of every typed configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Strict and immutable: unknown keys are refused, values are not coerced across kinds, defaults are validated."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def dump(self) -> dict[str, Any]:
        """The configuration as plain YAML-able values; ``type(self).model_validate`` reads it back."""
        return self.model_dump(mode="json", by_alias=True)
