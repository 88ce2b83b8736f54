"""What a run consists of: its config, its stores, its trainers' specs, its tickets, its periods."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

from rayfm.config import DataError
from rayfm.data.sources.base import SOURCES
from rayfm.data.store import ExampleStore
from rayfm.labels.store import LabelStore
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.follow import Arrival, Stream, complete_periods, open_source
from rayfm.pipeline.plan import choose_periods, student_specs, teacher_spec
from rayfm.pipeline.records import RunRecords
from rayfm.pipeline.tickets import Tickets, check_order, metadata_path
from rayfm.snapshots.collect import Collector
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import SQLiteMetadataStore, open_metadata
from rayfm.training.spec import TrainerSpec


class RunState:
    """A run's stores, its trainers' specs and its tickets, and the periods as far as they are known.

    Args:
        config: the pipeline's config.
        follow: take periods up as they become complete; without it, those that are there (of a run that has followed,
            those that it took, and what came later).
        anew: forget the periods of a run of this name.

    Raises:
        ConfigError: the schedule does not fit the periods.
        DataError: the source cannot be read, or the run's folder not be written.
    """

    def __init__(self, config: PipelineConfig, follow: bool = False, anew: bool = False) -> None:
        # Workers run in folders of their own: a path relative to this one would mean another place there.
        storage, runs = (str(Path(folder).absolute()) for folder in (config.storage, config.runs))
        place = None if config.label_store is None else config.label_store.absolute()
        config = config.model_copy(update={"storage": storage, "runs": runs, "label_store": place})
        self.config, self.follow = config, follow
        self.source = SOURCES.build(config.data.source, config.schema_)
        self.run_dir = config.run_dir
        self.store = ExampleStore(config.storage)
        self.arrivals: list[Arrival] = []
        self.periods = self._find_periods(anew)
        check_order(self.periods)
        make_folder(self.run_dir)
        self.metadata = SQLiteMetadataStore(metadata_path(self.run_dir))
        self.tickets = Tickets(self.metadata, config.name)
        self.stream = Stream(self.tickets)
        self.labels = LabelStore(config.label_storage, self.metadata)
        self.snapshots = SnapshotStore(self.run_dir)
        # Where services follow `current`: what is current, held or kept is known there alone.
        url = config.endpoints.metadata
        followed = self.metadata if url is None else open_metadata(url)
        self.collector = Collector(self.snapshots, followed, keep=config.keep_snapshots)
        self.teacher_specs = [teacher_spec(config, name, self.periods) for name in config.teacher_order()]
        self.student_specs = student_specs(config, self.periods)
        if follow:
            for specs in (self.teacher_specs, self.student_specs):
                specs[:] = [spec.model_copy(update={"follow": True}) for spec in specs]
        self.specs: list[TrainerSpec] = [*self.teacher_specs, *self.student_specs]
        self.records = RunRecords(config, self.specs, self.tickets, self.periods)

    def _find_periods(self, anew: bool) -> tuple[str, ...]:
        """The periods as far as they are known; those of a stream are in ``arrivals`` too."""
        standing = metadata_path(self.run_dir)
        if not anew and standing.exists():  # opening it would make it
            self.arrivals = Stream(Tickets(SQLiteMetadataStore(standing), self.config.name)).arrivals()
        if not self.follow and not self.arrivals:
            return choose_periods(self.config, [period.name for period in self.source.periods()])
        taken = [arrival.period for arrival in self.arrivals]
        for arrival in complete_periods(self.config, self.store, open_source(self.config), taken):
            if not taken or arrival.period > taken[-1]:
                self.arrivals.append(dataclasses.replace(arrival, at=time.time()))
        return choose_periods(self.config, [arrival.period for arrival in self.arrivals], open_end=True)

    def take(self, arrival: Arrival) -> None:
        """A period more, for whoever walks through them here; workers read it from the stream."""
        self.specs = [spec.model_copy(update={"periods": (*spec.periods, arrival.period)}) for spec in self.specs]
        self.arrivals = [*self.arrivals, arrival]
        self.periods = (*self.periods, arrival.period)
        self.records.specs, self.records.periods = self.specs, self.periods


def make_folder(path: Path) -> None:
    """Make a folder. Raises DataError where it is neither there nor can be made, or cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose other 'runs' and 'storage'") from None
