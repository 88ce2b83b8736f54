"""Names of what is stored: safe as a folder's name, in a URL and in a predicate."""

from __future__ import annotations

import re

from rayfm.config.errors import RayfmError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def check_stored_name(what: str, name: str, error: type[RayfmError]) -> str:
    """``name`` if it is such a one.

    Args:
        what: is named, for the message.
        name: to be looked at.
        error: is raised where it could leave its folder, or has an odd character.
    """
    if not _NAME.fullmatch(name):
        raise error(
            f"{what} {name!r}: use letters, digits, '_', '-', '.', starting with a letter or digit (at most 128)"
        )
    return name
