"""``rayfm augment`` and the random logs that it can write."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from rayfm.augment.config import AugmentConfig, load_augment
from rayfm.augment.join import FeedbackJoin
from rayfm.augment.outcomes import apply_corrections
from rayfm.augment.random_logs import random_tables, write_random_logs
from rayfm.cli.main import app
from rayfm.config import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "feedback_join.yaml"
SMALL = ["random_logs.hours=8", "random_logs.impressions_per_hour=300"]


@pytest.fixture
def config_file(tmp_path, monkeypatch) -> Path:
    """The example with short windows and few rows, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    config = load_augment(EXAMPLE, SMALL).dump()
    config["tasks"]["conversion"]["window"] = config["tasks"]["watch_time"]["window"] = "30m"
    path = tmp_path / "join.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_command_joins_and_goes_on(config_file):
    runner = CliRunner()
    first = runner.invoke(app, ["augment", str(config_file)])
    assert first.exit_code == 0, first.output
    for text in ("random logs ->", "labelled examples", "duplicate events", "impressions wait for their windows"):
        assert text in first.output
    second = runner.invoke(app, ["augment", str(config_file), "--through", "2024-01-02T01"])
    assert "random logs" not in second.output
    assert "1 batch: nothing new" in second.output
    assert "complete: examples/2024-01-01" in second.output
    third = runner.invoke(app, ["augment", str(config_file), "--through", "2024-01-02T01"])
    assert "0 batches: nothing new" in third.output
    rows = pq.read_table("runs/feedback_join/joined/examples", partitioning=None)
    late = pq.read_table("runs/feedback_join/joined/rejects/join/impressions", partitioning=None)
    assert rows.num_rows + late.num_rows == 8 * 300
    assert len(pc.unique(rows["example_id"])) == rows.num_rows


def test_labels_are_what_the_logs_say(config_file):
    """What the join wrote and corrected, against a look at the whole log; rows beyond the lateness apart."""
    config = load_augment(config_file)
    write_random_logs(config)
    with FeedbackJoin(config) as join:
        lines = []
        join.run(datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), lines.append)
    total = {key: sum(line[key] for line in lines) for key in ("late_dropped", "corrections", "orphans", "bad")}
    assert total["bad"] == 0
    assert total["corrections"] > 0
    folder = Path(config.root)
    found = pq.read_table(folder / "examples", partitioning=None)
    found = apply_corrections(found, pq.read_table(folder / "corrections", partitioning=None)).to_pandas()
    shown = pq.read_table(config.impressions.path).to_pandas().set_index("impression_id")["shown_at"]
    shown = shown[~shown.index.duplicated()]
    clicks = pq.read_table(config.feedback["clicks"].path).to_pandas().drop_duplicates("event_id")
    lag = (clicks["clicked_at"] - clicks["impression_id"].map(shown)).dt.total_seconds()
    clicked = set(clicks["impression_id"][(lag >= 0) & (lag < 1800)])
    labels = found.set_index("example_id")["click"]
    wrong = sum(int(label != (example in clicked)) for example, label in labels.items())
    assert 0.05 < labels.mean() < 0.4
    assert wrong <= total["late_dropped"], "only what came beyond the lateness"


def test_random_logs_are_the_same_every_time_and_hold_every_nuisance():
    config = load_augment(EXAMPLE, SMALL)
    one, other = (random_tables(config, config.random_logs) for _ in range(2))
    for name, (table, arrival) in one.items():
        assert table.equals(other[name][0])
        assert (arrival[1:] >= arrival[:-1]).all()
        column = {"impressions": "impression_id"}.get(name, "event_id")
        assert len(pc.unique(table[column])) < table.num_rows, "some rows come twice"
    assert set(pc.unique(one["app"][0]["event"]).to_pylist()) == {"conversion", "watch_time"}
    assert pc.max(one["clicks"][0]["impression_id"]).as_py() >= 2400, "feedback without an impression"


def test_random_logs_leave_logs_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_augment(EXAMPLE, [*SMALL, "random_logs.hours=1"])
    (tmp_path / config.feedback["app"].path).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"random_logs: runs/feedback_join/logs/app is there already"):
        write_random_logs(config)
    for path in ("s3://bucket/logs", "logs/*.parquet"):
        with pytest.raises(ConfigError, match="must be a local folder"):
            write_random_logs(load_augment(EXAMPLE, [f"impressions.path={path}"]))
    without = AugmentConfig.model_validate(config.dump() | {"random_logs": None})
    assert not write_random_logs(without)


def test_a_config_error_is_one_line(config_file, capsys, monkeypatch):
    from rayfm.cli.main import main

    monkeypatch.setattr("sys.argv", ["rayfm", "augment", str(config_file), "--set", "tasks.click.window=0s"])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'tasks.click.window': is zero" in error
