"""Tickets: what a client holds for rows that were accepted.

A ticket is 32 characters of base32 (digits, then a to v, so that text order is number order): 10 of the time at which
it was given, in milliseconds since 1970, then 22 (110 bits) of the operating system's randomness. So nobody can guess
another's, tickets of a batch lie close together, and statistics of a file's lowest and highest ticket tell whether it
can hold one. Delta Lake keeps the first 32 characters of a text in its statistics: a ticket fits whole.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Literal

from rayfm.config import Config, DataError

_DIGITS = "0123456789abcdefghijklmnopqrstuv"
_TIME_DIGITS, _RANDOM_DIGITS = 10, 22
_TICKET = re.compile(f"[{_DIGITS}]{{{_TIME_DIGITS + _RANDOM_DIGITS}}}")

State = Literal["queued", "scored", "committed", "dead"]
"""``queued``: accepted durably; ``scored``: predicted, and about to be committed; ``committed``: in the label table;
``dead``: given up with a reason, rows kept until they are replayed or discarded."""


class TicketStatus(Config):
    """What ``GET /v1/labels/{ticket}`` answers."""

    ticket: str
    state: State
    teacher: str
    version: str
    """The snapshot that labels the rows; chosen when they were accepted."""

    rows: int
    """Rows accepted."""

    rejected: int = 0
    """Rows of the post that were refused, each with a reason, and kept in ``rejects/``."""

    failures: int = 0
    reason: str | None = None
    """Why it is dead, or why the last try failed."""

    table_version: int | None = None
    """A version of the near-line label table that holds the rows."""

    expires: float | None = None
    """Seconds since 1970 when a committed ticket is forgotten; its labels stay."""


class Backlog(Config):
    """What ``GET /v1/teachers/{teacher}/label`` answers: how far behind a teacher's labels are."""

    waiting: int
    """Tickets that are not labelled yet."""

    oldest_s: float
    """Seconds that the oldest of them has waited."""

    dead_letters: int
    rejected_rows: int
    """Rows in ``rejects/``."""


def new_ticket(now_s: float | None = None) -> str:
    """A ticket that nobody else has, for the time ``now_s`` (seconds since 1970; by default now)."""
    number = round((time.time() if now_s is None else now_s) * 1000)
    return _digits(number, _TIME_DIGITS) + _digits(secrets.randbits(5 * _RANDOM_DIGITS), _RANDOM_DIGITS)


def ticket_time(ticket: str) -> float:
    """When a ticket was given, in seconds since 1970."""
    number = 0
    for digit in ticket[:_TIME_DIGITS]:
        number = number * 32 + _DIGITS.index(digit)
    return number / 1000


def check_ticket(text: str) -> str:
    """``text`` if it has a ticket's form, so that it is safe in a path. Raises DataError otherwise."""
    if not _TICKET.fullmatch(text):
        raise DataError("that is no ticket: give what the post answered with")
    return text


def _digits(number: int, width: int) -> str:
    return "".join(_DIGITS[(number >> (5 * place)) & 31] for place in reversed(range(width)))
