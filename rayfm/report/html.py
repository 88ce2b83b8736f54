"""``report.html``: one self-contained file that shows a run."""

from __future__ import annotations

from pathlib import Path

from rayfm.config.durable import write_whole
from rayfm.report import cascade, sections
from rayfm.report.operations import operations
from rayfm.report.run import Run

SECTIONS = (
    sections.headline,
    sections.ne_over_periods,
    sections.calibration,
    cascade.stages,
    sections.labels,
    operations,
    sections.training,
    sections.data,
    sections.everything,
)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory, from what the run has written so far; returns its path.

    The file needs nothing else, and no network.

    Raises:
        DataError: no run there, or a file of it is damaged.
    """
    run = Run.read(run_dir)
    periods = run.summary.get("periods", [])
    facts = {
        "test periods": f"{periods[0]} to {periods[-1]} ({len(periods)})" if periods else "none yet",
        "models": ", ".join(dict.fromkeys(row["model"] for row in run.summary.get("metrics", []))) or "none yet",
        "tasks": ", ".join(task["name"] for task in run.summary.get("tasks", [])) or "none yet",
    }
    path = Path(run_dir) / "report.html"
    built = [build(run) for build in SECTIONS]
    write_page(path, run.name, facts, [section for section in built if section.parts or section.empty], run.config)
    return path


def write_page(
    path: Path, name: str, facts: dict[str, str], parts: list[sections.Section], config: str | None = None
) -> None:
    """Write a page of sections; ``config`` is shown folded at its end (None: no such part)."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Figures are our own SVG; everything else on the page is escaped.
    environment.filters["svg"] = Markup
    page = environment.get_template("page.html").render(name=name, facts=facts, sections=parts, config=config)
    # Not synced: a page is drawn anew from the run at any time.
    write_whole(path, lambda file: file.write(page.encode()))
