"""Near-line labels as a client sees them: what a post is answered with, and where its rows are.

The service's own words for the same are `rayfm.serving.nearline.intake.Accepted` and
`rayfm.serving.nearline.tickets.TicketStatus`.

A post is accepted before it is answered, and no key tells that two are the same. `rayfm.client.Client.label` sends one
again where it was refused (429, 503) and where the connection was lost: then it may have been accepted before, its rows
have two tickets, and a look-up takes the first one's labels. It does not where the service's process died with the post
(a 500 of the proxy's): that raises `ServerFault`, and the caller decides. To ask for a ticket changes nothing and is
always tried again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rayfm.client.errors import Reject, ServerFault

State = Literal["queued", "scored", "committed", "dead"]


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What a post was answered with: its good rows will be labelled, or be a dead letter. Plain values: keep it.

    Attributes:
        ticket: the text to ask with.
        teacher: who labels.
        version: the teacher's snapshot that labels every one of the rows.
        rows: how many were accepted.
        rejected: how many were refused.
        rejects: of these, the first 100.
    """

    ticket: str
    teacher: str
    version: str
    rows: int
    rejected: int = 0
    rejects: tuple[Reject, ...] = ()


@dataclasses.dataclass(frozen=True)
class TicketState:
    """Where a ticket's rows are.

    Attributes:
        ticket, teacher, version, rows, rejected: as `Ticket`'s.
        state: ``queued`` and ``scored`` pass; ``committed`` and ``dead`` stay.
        failures: tries that failed.
        reason: why it is dead, or why the last try failed.
        table_version: where it is committed, a version of the near-line label table that holds the rows.
        expires: where it is committed, seconds since 1970 when the service forgets the ticket; the labels stay.
    """

    ticket: str
    teacher: str
    version: str
    rows: int
    state: State
    rejected: int = 0
    failures: int = 0
    reason: str | None = None
    table_version: int | None = None
    expires: float | None = None


def read_rejects(body: Any) -> tuple[Reject, ...]:
    """The refused rows that a reply names; none where it names none."""
    entries = body.get("rejects") if isinstance(body, Mapping) else None
    return tuple(Reject(int(entry["row"]), str(entry["reason"])) for entry in entries or ())


def read_ticket(body: Any) -> Ticket:
    """The reply to a post. Raises ServerFault where it is none."""
    try:
        values = {field.name: body[field.name] for field in dataclasses.fields(Ticket) if field.name != "rejects"}
        return Ticket(**values, rejects=read_rejects(body))
    except (KeyError, TypeError, ValueError) as error:
        raise ServerFault(f"the reply is no ticket: {error!r}") from None


def read_state(body: Any) -> TicketState:
    """The reply to a question for a ticket. Raises ServerFault where it is none."""
    try:
        # What a newer service says besides is left out.
        known = {field.name for field in dataclasses.fields(TicketState)}
        return TicketState(**{name: value for name, value in body.items() if name in known})
    except (AttributeError, TypeError) as error:
        raise ServerFault(f"the reply is no ticket's state: {error!r}") from None
