"""Clients of the service under soak: one posts rows to label, others ask for scores and check each reply."""

from __future__ import annotations

import abc
import collections
import functools
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import torch
from example_store import every_feature_rows
from served_models import as_examples, candidate_rows, predictions, user_row

from rayfm.client import Client, ScoreError
from rayfm.client.retry import Retries
from rayfm.client.wire import ARROW, Scored, write_stream

Predictor = Callable[[pa.Table], np.ndarray]
"""Rows to their predictions of ``click``."""

DAY2_US = 1_704_153_600_000_000
"""2024-01-02T00:00Z, after the teachers' training."""
UNREAD = ("click", "watch", "user_id", "request_id", "logged/ranking/click")


class Load(threading.Thread, abc.ABC):
    """A client in a thread of its own, which stops when told."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = threading.Event()
        self.refused: collections.Counter[str] = collections.Counter()
        """What was not answered, by what came instead."""
        self.crash: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.once()
        except BaseException as error:
            self.crash = error

    @abc.abstractmethod
    def once(self) -> None:
        """One request."""

    def stop(self) -> None:
        """Tell it to stop."""
        self.stopping.set()

    def end(self) -> None:
        """Stop; what went wrong in the thread is raised here."""
        self.stop()
        self.join(60)
        if self.crash is not None:
            raise self.crash


class Poster(Load):
    """Posts rows for near-line labels and keeps what was accepted."""

    def __init__(self, url: str, teacher: str, seed: int, mean_s: float = 0.25) -> None:
        super().__init__("poster")
        self.url = f"{url}/v1/teachers/{teacher}/label"
        self._draw, self._mean_s, self._next = random.Random(seed), mean_s, 0
        self.accepted: dict[str, tuple[str, pa.Table]] = {}
        """Ticket -> the version that is to label, and the rows."""
        self.sent: dict[int, pa.Table] = {}
        """First example id -> rows of a post whose answer was lost: they may be labelled, under an unknown ticket."""

    def once(self) -> None:
        rows = self._draw.randrange(1, 40)
        table = every_feature_rows(rows, self._draw.randrange(10**6), start=DAY2_US).drop_columns(list(UNREAD))
        first, self._next = self._next, self._next + rows
        table = table.set_column(0, "example_id", pa.array(np.arange(first, first + rows)))
        self.post(table, first)
        self.stopping.wait(self._draw.expovariate(1 / self._mean_s))

    def post(self, table: pa.Table, first: int) -> None:
        request = urllib.request.Request(self.url, write_stream(table), {"content-type": ARROW})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code in (429, 503):
                self.refused[str(error.code)] += 1
                if error.code == 503:
                    self.sent[first] = table  # a proxy's 503 does not say whether the replica had it
            else:  # Serve's proxy says 500 where its replica died with the request
                self.refused[f"{error.code}"] += 1
                self.sent[first] = table
            return
        except OSError as error:
            self.refused[type(error).__name__] += 1
            self.sent[first] = table
            return
        assert (answer["rows"], answer["rejected"]) == (table.num_rows, 0), answer
        self.accepted[answer["ticket"]] = (answer["version"], table)


class Scorer(Load):
    """Asks for scores and compares each reply with what the version that it names predicts.

    Args:
        name: for messages.
        ask: sends one request.
        rows: the request's rows, as examples.
        versions: version -> what it predicts for rows.
        pause_s: between requests.
    """

    def __init__(
        self, name: str, ask: Callable[[], Scored], rows: pa.Table, versions: Mapping[str, Predictor], pause_s: float
    ) -> None:
        super().__init__(name)
        self._ask, self._rows, self._versions, self._pause_s = ask, rows, versions, pause_s
        self._expected: dict[str, np.ndarray] = {}
        self.replies: list[str] = []
        """The version of each reply."""
        self.slowest_s = 0.0

    def once(self) -> None:
        begin = time.monotonic()
        try:
            scored = self._ask()
        except ScoreError as error:
            self.refused[type(error).__name__] += 1
            self.stopping.wait(0.1)
            return
        self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
        if scored.version not in self._expected:
            self._expected[scored.version] = self._versions[scored.version](self._rows)
        found = scored.predictions["click"].to_numpy()
        np.testing.assert_allclose(found, self._expected[scored.version], rtol=1e-4, atol=1e-5)
        self.replies.append(scored.version)
        self.stopping.wait(self._pause_s)


def scorers(
    url: str, student: str, students: Mapping[str, Predictor], teacher: str, teachers: Mapping[str, Predictor],
    attempts: int, pause_s: float,
) -> list[Scorer]:  # fmt: skip
    """Two clients of a student and one of a teacher, who waits three times as long as they do after each reply; a call
    is sent at most ``attempts`` times."""
    client = Client(url, timeout_s=20.0, retries=Retries(attempts=attempts))
    user, candidates, rows = user_row(), candidate_rows(40), every_feature_rows(30, 2)
    ask_student = functools.partial(client.score, student, user, candidates)
    ask_teacher = functools.partial(client.score_teacher, teacher, rows)
    return [
        Scorer("student 1", ask_student, as_examples(user, candidates), students, pause_s),
        Scorer("student 2", ask_student, as_examples(user, candidates), students, pause_s),
        Scorer("teacher", ask_teacher, rows, teachers, 3 * pause_s),
    ]


def predictor(model: torch.nn.Module) -> Predictor:
    """A version's own predictions of ``click``."""
    return lambda table: predictions(model, table)["click"]
