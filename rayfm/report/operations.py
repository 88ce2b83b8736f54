"""The section of the page on operations: which versions were promoted and which were not, and what alerts fired."""

from __future__ import annotations

from typing import Any

from rayfm.report.run import Row, Run
from rayfm.report.sections import Listing, Section


def operations(run: Run) -> Section:
    """The guard's decisions and the alerts; without parts where there is neither, and then no section of the page."""
    section = Section("Operations")
    decided = run.events("promotion", "model", "version")
    if decided:
        section.parts.append(
            Listing(
                "Promotion",
                ["model", "version", "decision", "scored on", "beside", "reason"],
                [_decision(event) for event in decided],
                "A version is scored on the period after the last one that it was trained on, beside the newest one "
                "promoted before it. The newest version waits until that period has come.",
                folded=all(event["decision"] == "promoted" for event in decided),
            )
        )
    if run.alerts:
        section.parts.append(
            Listing(
                "Alerts",
                ["period", "alert", "subject", "", "value", "bar"],
                [_alert(line) for line in run.alerts],
                "A line where an alert begins to fire, and one where it is over.",
            )
        )
    return section


def _decision(event: Row) -> list[Any]:
    refused = event["decision"] == "refused"
    return [
        (event["model"], "name"),
        (event["version"], "name"),
        ("not promoted", "worse") if refused else ("promoted", ""),
        event.get("scored_on") or "-",
        event.get("predecessor") or "-",
        (event["reason"], "reason"),
    ]


def _alert(line: Row) -> list[Any]:
    state = ("fires", "worse") if line["firing"] else ("over", "better")
    return [
        (line["period"], "name"),
        (line["alert"], "name"),
        (line["subject"], "name"),
        state,
        f"{line['value']:,.4g}",
        f"{line['bar']:,.4g}",
    ]
