"""What a selection found, and the files that it leaves."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rayfm.config import Config, DataError
from rayfm.config.durable import write_whole
from rayfm.schema import Kind
from rayfm.selection.combine import WAYS, combine, union_of_size
from rayfm.selection.importance import Importance, matters

FILE, TABLE, FIGURE, LISTS = "selection.json", "selection.csv", "selection.png", "lists"


class FeatureImportance(Config):
    """One feature's loss changes on one kind of examples."""

    mean: float
    """Over batches and shuffles."""
    deviation: float
    error: float
    """Standard error of the mean, over batches."""
    rank: int
    matters: bool
    """Whether it is more than noise and the threshold."""


class Measurement(Config):
    """Algorithm 1 on one kind of examples."""

    loss: float
    """Of the simplified student, nothing shuffled."""
    batches: int
    rows: int
    features: dict[str, FeatureImportance]
    """In the order of the candidates."""


class Selection(Config):
    """Importances and lists, with what they were made of."""

    name: str
    teacher: str
    student: str
    """The simplified student's model: its type."""
    tasks: tuple[str, ...]
    candidates: tuple[str, ...]
    trained: tuple[str, ...]
    """Periods that teacher and student were trained on."""
    withheld: tuple[str, ...]
    """Periods that importance was measured on."""
    top_k: int
    measured: dict[Kind, Measurement]
    lists: dict[str, tuple[str, ...]]
    """Way -> features, best first; a union of no more than ``top_k`` features besides the six ways."""

    def chosen_by(self, feature: str) -> tuple[str, ...]:
        """The six ways whose lists have the feature."""
        return tuple(way for way in WAYS if feature in self.lists[way])

    def by_rank(self) -> list[str]:
        """The candidates by the better of their two ranks."""
        kinds = list(self.measured.values())

        def order(name: str) -> tuple[int, int]:
            ranks = [kind.features[name].rank for kind in kinds]
            return min(ranks), sum(ranks)

        return sorted(self.candidates, key=order)


def measurement(importance: Importance, threshold: float, sigmas: float) -> Measurement:
    """The importances of one kind as they are stored."""
    matter = matters(importance, threshold, sigmas)
    return Measurement(
        loss=importance.loss,
        batches=importance.batches,
        rows=importance.rows,
        features={
            name: FeatureImportance(
                mean=float(importance.mean[i]),
                deviation=float(importance.deviation[i]),
                error=float(importance.error[i]),
                rank=int(importance.ranks[i]),
                matters=bool(matter[i]),
            )
            for i, name in enumerate(importance.features)
        },
    )


def feature_lists(
    impressions: Importance, considerations: Importance, k: int, threshold: float, sigmas: float, weight: float
) -> dict[str, tuple[str, ...]]:
    """The lists of the six ways, and ``union_of_size``: a union of at most k features."""
    matter = [matters(importance, threshold, sigmas) for importance in (impressions, considerations)]
    lists = combine(impressions, considerations, matter[0], matter[1], k, weight)
    lists["union_of_size"] = union_of_size(lists["impressions_only"], lists["considerations_only"], k)
    return lists


def write_selection(selection: Selection, folder: Path) -> None:
    """Write ``selection.json``, ``selection.csv``, ``selection.png`` and a YAML list for each way that has features.

    ``selection.json`` comes last: where it stands, all do.

    Raises:
        CapacityError: a file cannot be written.
    """
    from rayfm.selection.figure import draw

    _write_text(folder / TABLE, csv_table(selection))
    draw(selection, folder / FIGURE)
    for way, features in selection.lists.items():
        path = folder / LISTS / f"{way}.yaml"
        path.unlink(missing_ok=True)
        if features:
            _write_text(path, feature_list(selection, way))
    _write_text(folder / FILE, selection.model_dump_json(indent=1))


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def read_selection(folder: Path) -> Selection:
    """What `write_selection` wrote.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        return Selection.model_validate_json(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run `rayfm select`") from None
    except ValueError as error:
        raise DataError(f"{path}: is no selection ({str(error).splitlines()[0]}); select again") from None


def feature_list(selection: Selection, way: str) -> str:
    """A way's features as a YAML list, which a config takes with ``features: {include: FILE}``."""
    what = WAYS.get(way, f"union of at most {selection.top_k} features")
    features = selection.lists[way]
    lines = [
        f"# {what}: {len(features)} of {len(selection.candidates)} candidates, best first",
        f"# selection {selection.name}, importance measured on {', '.join(selection.withheld)}",
        *(f"- {name}" for name in features),
    ]
    return "\n".join(lines) + "\n"


def csv_table(selection: Selection) -> str:
    """A row a feature and kind."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["feature", "kind", "rank", "mean", "deviation", "error", "relative", "matters", "lists"])
    for name in selection.by_rank():
        for kind, measured in selection.measured.items():
            found = measured.features[name]
            numbers = (found.rank, found.mean, found.deviation, found.error, found.mean / measured.loss)
            writer.writerow([name, kind, *numbers, found.matters, " ".join(selection.chosen_by(name))])
    return out.getvalue()
