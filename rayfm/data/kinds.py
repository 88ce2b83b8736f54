"""Numbers of the two kinds of examples, where a string would be in the way."""

from __future__ import annotations

IMPRESSION, CONSIDERATION = 0, 1
"""Values of ``Batch.kind``."""
