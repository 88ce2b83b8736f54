"""The importances of a selection as a figure: bars with deviations, impressions beside considerations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfm.config.durable import write_whole

if TYPE_CHECKING:
    from rayfm.selection.result import Selection

TITLES = {"impression": "Impressions", "consideration": "Considerations"}
COLOURS = {"impression": "#0b84d8", "consideration": "#e07b00"}
GREY = "#b4b8bf"

MOST = 40
"""Features in the figure, the best of either ranking."""


def draw(selection: Selection, path: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        CapacityError: it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = selection.by_rank()[:MOST]
    # A name with dollar signs is a name, not a formula.
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(8.5, 1.3 + 0.17 * len(names)), layout="constrained")
        places = range(len(names))
        panels = figure.subplots(1, len(selection.measured), sharey=True, squeeze=False)[0]
        for axes, (kind, measured) in zip(panels, selection.measured.items(), strict=True):
            found = [measured.features[name] for name in names]
            means = [100 * feature.mean / measured.loss for feature in found]
            deviations = [100 * feature.deviation / measured.loss for feature in found]
            chosen = [feature.matters and feature.rank <= selection.top_k for feature in found]
            colours = [COLOURS[kind] if taken else GREY for taken in chosen]
            axes.barh(places, means, color=colours, height=0.7)
            axes.errorbar(means, places, xerr=deviations, fmt="none", ecolor="#444444", elinewidth=0.8, capsize=1.5)
            axes.axvline(0, color="#444444", linewidth=0.6)
            axes.set_title(f"{TITLES[kind]}: loss {measured.loss:.4f}, {measured.batches} batches", loc="left")
            axes.set_xlabel("change of the loss when the feature is shuffled, %")
            axes.grid(axis="x", alpha=0.25, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            handles = [
                Patch(color=COLOURS[kind], label=f"among its top {selection.top_k}"),
                Patch(color=GREY, label="below, or noise"),
            ]
            axes.legend(handles=handles, loc="lower right", frameon=False)
        panels[0].set_yticks(list(places), names)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png", metadata={"Software": None}))
