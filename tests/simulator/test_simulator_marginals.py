"""``python -m rayfm.simulator.marginals`` prints the table of docs/simulator.md."""

from __future__ import annotations

import pytest

from rayfm.simulator import marginals


def test_the_page_of_marginals_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["marginals", "--seeds", "100", "--periods", "1"])
    marginals.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-2:] == ["seed 100", "mean"]
    values = {row[0]: row[1:] for row in rows[2:]}
    assert values["impressions a period"] == ["15000", "15000"], "as in docs/simulator.md"
    assert 0 < float(values["served value over the best possible"][0]) < 1
