"""What reads a period's batches for a trainer: which columns, which look-ups of labels, and by which reader."""

from __future__ import annotations

from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader, RayDataReader, Reader
from rayfm.data.sampling import ConsiderationShare
from rayfm.data.steps import Lookup, ReadPlan, TruthLookup
from rayfm.data.store import ExampleStore
from rayfm.models.histories import HistoryFeature
from rayfm.schema import LOGGED_PREFIX
from rayfm.training.ids import Vocabularies
from rayfm.training.spec import LabelSource, PinnedLabels, TrainerSpec


class Reading:
    """Makes the readers of one rank. Every call is given the spec, which grows where a trainer follows a stream.

    Args:
        store: the examples.
        ids: the vocabularies, as far as they have grown.
        label_source: makes look-ups of labels.
        rank, world: this worker's lanes.
    """

    def __init__(
        self, store: ExampleStore, ids: Vocabularies, label_source: LabelSource | None, rank: int, world: int
    ) -> None:
        self.store, self.ids, self.label_source, self.rank, self.world = store, ids, label_source, rank, world
        self._ray_reader: RayDataReader | None = None

    def training(self, spec: TrainerSpec, index: int, start: int, labels: dict[str, PinnedLabels]) -> Reader:
        """The reader that a period is trained from, beginning at step ``start``."""
        columns = tuple(dict.fromkeys(c for learner in spec.learners for c in learner.supervision()))
        widths = {name: width for learner in spec.learners for name, width in learner.representations().items()}
        period, share = spec.periods[index], spec.consideration_share
        plan, encoder = self.plan(spec, period, columns, labels, spec.training.batch_size, share, widths)
        if spec.training.reader == "arrow":
            return ArrowReader(plan, encoder, self.rank, self.world)
        if spec.teachers:  # labels arrive period by period, and with them their version
            return self._by_ray_data(spec, plan, encoder, [period], start)
        if self._ray_reader is None or period not in self._ray_reader.periods:
            prepared = set(self.store.periods())
            # Not those that are predicted alone: the pipeline would read them, and hold their blocks, for nobody.
            ahead = spec.periods[index : spec.trained]
            known = [period for period in ahead if period in prepared]
            self._ray_reader = self._by_ray_data(spec, plan, encoder, known, start)
        self._ray_reader.encoder = encoder  # the period's: vocabularies grow
        return self._ray_reader

    def _by_ray_data(
        self, spec: TrainerSpec, plan: ReadPlan, encoder: Encoder, periods: list[str], start: int
    ) -> RayDataReader:
        tasks, nodes = spec.training.read_tasks, spec.nodes.data
        return RayDataReader(plan, encoder, periods, self.rank, self.world, start, tasks=tasks, nodes=nodes)

    def prediction(
        self, spec: TrainerSpec, period: str, columns: tuple[str, ...], labels: dict[str, PinnedLabels]
    ) -> Reader:
        """The reader that a period is predicted from."""
        size = spec.training.predict_batch_size
        plan, encoder = self.plan(spec, period, columns, labels, size, spec.evaluated_share)
        return ArrowReader(plan, encoder, self.rank, self.world)

    def plan(
        self,
        spec: TrainerSpec,
        period: str,
        supervision: tuple[str, ...],
        labels: dict[str, PinnedLabels],
        batch_size: int,
        share: ConsiderationShare,
        widths: dict[str, int] | None = None,
    ) -> tuple[ReadPlan, Encoder]:
        """What to read of a period, and what makes batches of it."""
        features = spec.features
        if features is not None:  # every model takes its own columns from all the dense ones
            features = (*features, *(f.name for f in spec.schema_.features if f.kind == "dense"))
        read_histories = histories(spec)
        read = {**(widths or {}), **{name: history.width or 0 for name, history in read_histories.items()}}
        representations = tuple(read.items())
        encoder = Encoder(
            spec.schema_,
            features,
            supervision,
            representations=representations,
            vocabularies=self.ids.current,
        )
        lookups: list[Lookup] = []
        truth = tuple(name for name in supervision if name.startswith("truth/"))
        if truth:
            lookups.append(TruthLookup(self.store, truth))
        for teacher, pinned in labels.items():
            tasks = tuple(n.partition("/")[2] for n in supervision if n.partition("/")[0] == teacher)
            if tasks and self.label_source is not None:
                lookups.append(self.label_source.lookup(teacher, pinned, tasks))
        logged = [name for name in supervision if name.startswith(LOGGED_PREFIX)]
        columns = tuple(dict.fromkeys([*encoder.columns, "sampling_weight", "request_id", "user_id", *logged]))
        stored = tuple(
            self.label_source.representation(teacher, labels[teacher], width)
            for teacher, width in representations
            if teacher in labels and self.label_source is not None
        )
        # Where the teacher has labelled nothing yet, nobody has a history.
        stored += tuple(
            self.label_source.history(history, self.store, period)
            for history in read_histories.values()
            if history.teacher in labels and self.label_source is not None
        )
        plan = ReadPlan(self.store, columns, batch_size, supervision, tuple(lookups), share, representations, stored)
        return plan, encoder


def histories(spec: TrainerSpec) -> dict[str, HistoryFeature]:
    """Name -> history, of those that any of the models reads."""
    return {name: history for learner in spec.learners for name, history in learner.histories().items()}
