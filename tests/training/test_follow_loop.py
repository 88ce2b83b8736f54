"""A loop that follows: periods that come while it trains, a stop between two steps, going on from there."""

from __future__ import annotations

import json

import pytest
from example_store import write_store
from training_runs import Free, IdLabels, learner, losses, spec, train_here

from rayfm.training.follow import Following, StopRequested, ask_or_stop, unless_stopped
from rayfm.training.spec import PinnedLabels
from rayfm.training.trainer import fit_here

DAYS = ("2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04")


class Followed(Free):
    """A stream of four days; asked to stop at its ``stop``-th question whether to."""

    def __init__(self, stop: int | None = None, days: tuple[str, ...] = DAYS) -> None:
        super().__init__()
        self.stop, self.days, self.asked, self.waited = stop, days, 0, []

    def next_period(self, after: str) -> str | None:
        place = self.days.index(after) + 1
        if self.stop == 0:
            raise StopRequested
        return self.days[place] if place < len(self.days) else None

    def stopping(self) -> bool:
        self.asked += 1
        return self.stop is not None and self.asked >= self.stop

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        return {}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(DAYS), impressions=300, considerations=100)
    return root


def followed(store, run_dir, periods=DAYS[:2], **changes):
    return spec(store, run_dir, learner("fm")).model_copy(update={"periods": periods, "follow": True, **changes})


@pytest.fixture(scope="module")
def fixed(store, tmp_path_factory):
    """The same training of a list that is known from the start."""
    trainer = followed(store, tmp_path_factory.mktemp("fixed"), DAYS, follow=False)
    train_here(trainer)
    return trainer


def test_a_trainer_that_follows_ends_where_one_that_knew_its_periods_does(store, tmp_path, fixed):
    trainer, coordinator = followed(store, tmp_path), Followed()
    fit_here(trainer, coordinator, IdLabels())
    assert [period for period, _ in coordinator.done] == list(DAYS)
    whole = trainer.model_copy(update={"periods": DAYS})
    assert losses(whole) == losses(fixed)
    assert coordinator.done[-1][1].keys() == {"fm.none.1"}


def test_stops_are_gone_on_from_with_each_example_once(store, tmp_path, fixed, monkeypatch):
    """Stopped again and again, in predicting and in training; the end is that of the unbroken training."""
    monkeypatch.setattr("rayfm.training.follow.ASK_EVERY_S", 0.0)  # asked between any two steps
    trainer = followed(store, tmp_path)
    done: list[str] = []
    phases: set[bool] = set()
    for attempt in range(100):
        coordinator = Followed(stop=1 + attempt % 6)  # six questions are more than a period's predicting has steps
        fit_here(trainer, coordinator, IdLabels())
        done += [period for period, _ in coordinator.done if period not in done]
        if len(done) == 4:
            break
        newest = sorted((trainer.folder / "checkpoints").glob("*/state.json"))[-1:]
        phases |= {json.loads(path.read_text())["cursor"]["period"] is None for path in newest}
    assert phases == {True, False}, "stopped between periods or in predicting, and in training"
    assert done == list(DAYS)
    whole = trainer.model_copy(update={"periods": DAYS})
    ours, theirs = losses(whole), losses(fixed)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-6), key
    for period in DAYS:
        record = json.loads((trainer.folder / "periods" / f"{period}.json").read_text())
        assert record["examples"] == json.loads((fixed.folder / "periods" / f"{period}.json").read_text())["examples"]


def test_a_stop_while_it_waits_for_the_next_period(store, tmp_path):
    trainer, coordinator = followed(store, tmp_path), Followed(stop=None)
    coordinator.days = DAYS[:3]
    coordinator.next_period = lambda after: (_ for _ in ()).throw(StopRequested())
    fit_here(trainer, coordinator, IdLabels())
    assert [period for period, _ in coordinator.done] == list(DAYS[:2])
    again = Followed()
    fit_here(trainer, again, IdLabels())  # it was told two periods, and has walked through as many
    assert [period for period, _ in again.done] == [DAYS[1], *DAYS[2:]], (
        "the newest is published once more, then new ones"
    )


def test_a_worker_that_starts_again_catches_up_with_the_stream(store, tmp_path):
    trainer = followed(store, tmp_path)
    fit_here(trainer, Followed(days=DAYS[:3]), IdLabels())
    again = Followed()
    fit_here(trainer, again, IdLabels())  # told two periods; its checkpoint is past three
    assert [period for period, _ in again.done] == [DAYS[2], DAYS[3]]


def test_a_coordinator_that_knows_no_next_period_is_refused(store, tmp_path):
    with pytest.raises(TypeError, match="Free knows no next period"):
        fit_here(followed(store, tmp_path), Free(), IdLabels())


def test_a_request_to_stop_travels_as_an_answer():
    def stops() -> str:
        raise StopRequested

    assert unless_stopped(ask_or_stop(lambda: "labels")) == "labels"
    mark = ask_or_stop(stops)
    with pytest.raises(StopRequested):
        unless_stopped(mark)


def test_questions_come_about_every_half_second():
    now = [0.0]
    coordinator = Followed()
    following = Following(coordinator, lambda ask: ask(), clock=lambda: now[0])
    for _ in range(400):
        now[0] += 0.01
        assert not following.stops()
    assert 8 <= coordinator.asked <= 8 + 7, "4 s of steps of 10 ms: 8 questions, and those until the pace is known"
    slow = Followed(stop=2)
    following = Following(slow, lambda ask: ask(), clock=lambda: now[0])
    for step in range(2):
        now[0] += 3.0
        assert following.stops() == (step == 1)
