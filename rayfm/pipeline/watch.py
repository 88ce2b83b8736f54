"""How far a run's parts are: what a display shows, and how far each trainer is behind the stream."""

from __future__ import annotations

import dataclasses

from rayfm.pipeline.follow import Lag, lag
from rayfm.pipeline.plan import periods_to_label
from rayfm.pipeline.state import RunState
from rayfm.training.progress import progress_file
from rayfm.training.spec import TrainerSpec


@dataclasses.dataclass
class Watch:
    """What a display shows of a run under way; read from files and tickets, so it can be late but not wrong."""

    pipeline: RunState
    prepared: int
    labelled: dict[str, tuple[int, int]]
    """Teacher -> (periods labelled, periods to label)."""
    trained: dict[str, tuple[float, str]]
    """Trainer -> (periods done, fraction included; what it is doing)."""
    lag: dict[str, Lag] = dataclasses.field(default_factory=dict)
    """Of a run that follows, trainer -> how far it is behind."""


class Progress:
    """Counts what is finished; what was counted once is not looked up again.

    Args:
        run: the run.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run
        self._done: dict[str, int] = {}
        self._labelled: dict[str, int] = {}

    def watch(self) -> Watch:
        """How far the parts are."""
        prepared = set(self.run.store.periods())
        trained, behinds = {}, self.lags()
        for spec in self.run.specs:
            periods, done = spec.periods, self._finished(spec)
            text, fraction = "", 0.0
            report = progress_file(spec).read()
            if report is not None and done < len(periods) and report["period"] == periods[done]:
                share = report["step"] / max(1, report["steps"])
                fraction = 0.2 * share if report["phase"] == "predict" else 0.2 + 0.8 * share
                text = f"{report['phase']} {report['period']}"
            elif done < len(periods):
                text = f"waiting for {periods[done]}" if done or report else "starting"
            behind = behinds.get(spec.name)
            if behind is not None and behind.periods:
                text += f"; {behind}"
            trained[spec.name] = (done + fraction, text)
        labelled = {}
        for teacher in self.run.config.teachers:
            wanted = periods_to_label(self.run.config, self.run.periods, teacher)
            count = self._labelled.get(teacher, 0)  # in order, so that what was counted stays so
            while count < len(wanted) and self.run.tickets.get("labelled", teacher, wanted[count]) is not None:
                count += 1
            self._labelled[teacher] = count
            labelled[teacher] = (count, len(wanted))
        return Watch(self.run, sum(period in prepared for period in self.run.periods), labelled, trained, behinds)

    def _finished(self, spec: TrainerSpec) -> int:
        """How many of its periods a trainer has finished; it does so in order."""
        done = self._done.get(spec.name, 0)
        while done < len(spec.periods) and (spec.folder / "periods" / f"{spec.periods[done]}.json").exists():
            done += 1
        self._done[spec.name] = done
        return done

    def places(self) -> dict[str, int]:
        """Trainer -> how many of the run's periods are behind it, those before its first included."""
        return {spec.name: len(self.run.periods) - len(spec.periods) + self._finished(spec) for spec in self.run.specs}

    def lags(self) -> dict[str, Lag]:
        """Trainer -> how far it is behind the newest complete period; empty for a run that never followed."""
        if not self.run.arrivals:
            return {}
        newest = self.run.stream.newest() or self.run.arrivals[-1]
        return {name: lag(name, done, self.run.arrivals, newest) for name, done in self.places().items()}
