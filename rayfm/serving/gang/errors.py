"""How a gang fails."""

from __future__ import annotations

from rayfm.config import CapacityError, RayfmError


class GangBroken(CapacityError):
    """A member died or an exchange failed: this gang answers no more and will be replaced. Ask again.

    As with a replica that died, the machines are at fault and not what was asked.
    """


class MemberLost(RayfmError):
    """A member's process is gone, or cannot be reached."""
