"""What the guard decided of a version, written beside it: ``<root>/snapshots/<model>/<version>/promotion.json``.

A manifest says whether its version is guarded, and it is there before anybody can load the version; so nobody takes a
guarded version by itself before the decision stands. The decision is made once: whoever writes the file first has
decided, and the same again after a crash finds it. People may promote a version that the guard refused.
"""

from __future__ import annotations

import datetime
import uuid
from pathlib import Path
from typing import Literal

from rayfm.config import Config, SnapshotError
from rayfm.config.durable import move_new, sync_dir, sync_open, write_durably
from rayfm.operations.promotion import Figure

PROMOTION = "promotion.json"

GUARDED = "guarded"
"""Key of a manifest's ``extra``: the version waits for a decision."""


GUARD = "the guard"
"""Who decides where people do not."""


class Promotion(Config):
    """A decision."""

    decision: Literal["promoted", "refused"]
    by: str
    """``the guard``, or the people who decided otherwise."""
    reason: str
    at: str
    """ISO time, UTC."""
    predecessor: str | None = None
    """The version that it was compared with; None for a first one."""
    period: str | None = None
    """The period that both were scored on, which neither was trained on."""
    rows: int = 0
    """Impressions scored."""
    figures: tuple[Figure, ...] = ()
    before: Promotion | None = None
    """What it took the place of, where people decided otherwise."""

    @property
    def promoted(self) -> bool:
        return self.decision == "promoted"


def now() -> str:
    """The time as a decision has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_promotion(folder: Path) -> Promotion | None:
    """The decision on the version in ``folder``; None where none was made.

    Raises:
        SnapshotError: the file is no decision.
    """
    path = folder / PROMOTION
    try:
        return Promotion.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SnapshotError(
            f"{path}: no decision of the guard's ({error}); delete the file, or write it anew with "
            "`rayfm snapshots promote`"
        ) from None


def decide(folder: Path, promotion: Promotion) -> tuple[Promotion, bool]:
    """Write a decision down, unless one stands. Durable once it returns.

    Returns:
        The decision that stands, and whether it is this one.

    Raises:
        SnapshotError: it cannot be written, or what stands is no decision.
    """
    temporary = folder / f".{PROMOTION}-{uuid.uuid4().hex}"
    try:
        try:
            with temporary.open("wb") as file:
                file.write(promotion.model_dump_json(indent=2).encode())
                sync_open(file)
            move_new(temporary, folder / PROMOTION)
            sync_dir(folder)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        standing = read_promotion(folder)
        if standing is not None:
            return standing, False
        raise SnapshotError(f"{folder / PROMOTION} came and went; look again") from None
    except OSError as error:
        raise SnapshotError(f"{folder}: cannot write the guard's decision ({error.strerror})") from None
    return promotion, True


def override(folder: Path, by: str, reason: str) -> Promotion:
    """Promote a version whatever the guard has said, or will say; what it said is kept."""
    try:
        standing = read_promotion(folder)
    except SnapshotError:  # a file that says nothing: there is nothing to keep of it
        standing = None
    promotion = Promotion(decision="promoted", by=by, reason=reason, at=now(), before=standing)
    write_durably(folder / PROMOTION, lambda file: file.write(promotion.model_dump_json(indent=2).encode()))
    return promotion
