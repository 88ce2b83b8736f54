"""How a run that follows (`rayfm run CONFIG --follow`) looks for new periods."""

from __future__ import annotations

from pydantic import Field

from rayfm.config import Config


class FollowConfig(Config):
    """How `rayfm run CONFIG --follow` looks for periods; a run that does not follow does not read it."""

    prepare: bool = True
    """Whether this run prepares the periods that its source gets; false: somebody else prepares them into the store,
    and the source is not looked at."""
    close_after_s: float | None = Field(None, ge=0)
    """A source's newest period is complete when a later one has begun, or, if this is given, so many seconds after its
    end by this machine's clock."""
    gap_s: float = Field(600.0, ge=0)
    """Seconds that a complete period waits for the ones before it, where it does not begin at the end of the newest one
    known; then they count as left out. A source that cannot be read is also tried for so long."""
    ahead: int = Field(2, ge=1)
    """Periods that a teacher may be ahead of the trainers that read its labels, and preparation of the slowest
    trainer."""
    poll_s: float = Field(5.0, gt=0)
    """Seconds between two looks at the source or the store."""
