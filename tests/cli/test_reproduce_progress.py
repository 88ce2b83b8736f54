"""``rayfm reproduce`` into a file: a line for each study as it ends."""

from __future__ import annotations

import io
import re

from rich.console import Console

from rayfm.cli.reproduced import Ended
from rayfm.reproduce.runner import Progress


def test_each_study_has_one_line_once_it_has_ended() -> None:
    told = io.StringIO()
    ended = Ended(Console(file=told, width=80))
    ended.update([Progress("cascade", 24, 3.5, 100), Progress("biased", 7, 0, 50)])
    assert told.getvalue() == ""
    for _ in range(2):
        ended.update([Progress("cascade", 24, 100, 100), Progress("biased", 7, 49.9, 50)])
    ended.update([Progress("cascade", 24, 100, 100), Progress("biased", 7, 50, 50)])
    lines = told.getvalue().splitlines()
    assert [re.sub(r"^ *\d+ s  ", "", line) for line in lines] == ["cascade (24 models)", "biased (7 models)"]
    assert all(re.match(r" *\d+ s  ", line) for line in lines)
