"""Taobao's display ads: the official files, and behaviour that is never seen too early."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from bucketed import examples_of

from rayfm.config import ConfigError, DataError, read_yaml, validate
from rayfm.data.prepare import prepare
from rayfm.data.sources import buckets as buckets_module
from rayfm.data.sources import tables as tables_module
from rayfm.data.sources.taobao_ad import TaobaoAdConfig, TaobaoAdSource
from rayfm.data.store import ExampleStore
from rayfm.data.validate import split_rejects
from rayfm.schema import Schema

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PIDS = ["430548_1007", "430539_1007"]
T0 = 1_494_032_110
"""2017-05-06 08:55:10, UTC+8: the example of the official description."""
DAY = 86_400

RAW_SAMPLE = f"""user,time_stamp,adgroup_id,pid,nonclk,clk
581738,{T0},1,430548_1007,1,0
449818,{T0 + 10},3,430548_1007,0,1
581738,{T0 + 100},3,430539_1007,1,0
581738,{T0 + 2 * DAY},9,430548_1007,1,0
,{T0 + 30},1,430548_1007,1,0
"""
AD_FEATURE = """adgroup_id,cate_id,campaign_id,customer,brand,price
3,6406,83237,1,95471,170.0
1,6423,83238,2,NULL,69.5
"""
USER_COLUMNS = "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation"
USER_PROFILE = f"""{USER_COLUMNS},new_user_class_level{" "}
581738,0,5,2,5,,3,0,3
234,0,5,2,5,2,3,1,
"""
BEHAVIOR_LOG = f"""user,time_stamp,btag,cate,brand
581738,{T0 - 50},pv,6250,91286
581738,{T0 - 60},ipv,6251,91287
449818,{T0 - 500},fav,1,2
581738,{T0 - 70},cart,6406,95471
581738,{T0 - 61},pv,6252,
581738,{T0},pv,6253,7
581738,{T0 + 40},pv,6254,8
581738,{T0 + 100},buy,6406,95471
581738,{T0 + 101},buy,6406,1
581738,{T0 + 5000},buy,6406,95471
777,{T0 - 5000},buy,1,1
,{T0 - 5000},buy,1,1
581738,-1,pv,1,1
581738,{T0 - 90},,1,1
"""


def schema_of(**more: object) -> Schema:
    return validate(
        Schema,
        {
            "tables": {name: {"rows": 1000} for name in ("user", "cate", "brand", "other")},
            "features": [
                {"name": "user_id", "kind": "sparse", "table": "user"},
                {"name": "adgroup_id", "kind": "sparse", "table": "other"},
                {"name": "pid", "kind": "sparse", "table": "other", "id_type": "string"},
                {"name": "cate_id", "kind": "sparse", "table": "cate"},
                {"name": "brand", "kind": "sparse", "table": "brand"},
                {"name": "price", "kind": "dense"},
                {"name": "pvalue_level", "kind": "sparse", "table": "other"},
                {"name": "new_user_class_level", "kind": "sparse", "table": "other"},
                {"name": "hour", "kind": "sparse", "table": "other"},
                {"name": "weekday", "kind": "sparse", "table": "other"},
                {"name": "cate_his", "kind": "sequence", "table": "cate", "max_len": 50},
                {"name": "brand_his", "kind": "sequence", "table": "brand", "max_len": 2},
                {"name": "btag_his", "kind": "sequence", "table": "other", "max_len": 50},
                {"name": "pv_cate", "kind": "sequence", "table": "cate", "max_len": 50},
                {"name": "buy_brand", "kind": "sequence", "table": "brand", "max_len": 50},
            ],
            "tasks": [{"name": "click"}, {"name": "cart"}, {"name": "buy"}],
            "traffics": PIDS,
            **more,
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "raw_sample.csv").write_text(RAW_SAMPLE)
    (tmp_path / "ad_feature.csv").write_text(AD_FEATURE)
    (tmp_path / "user_profile.csv").write_text(USER_PROFILE)
    (tmp_path / "behavior_log.csv").write_text(BEHAVIOR_LOG)
    return tmp_path


def source(folder: Path, schema: Schema | None = None, **more: object) -> TaobaoAdSource:
    return TaobaoAdSource(TaobaoAdConfig.model_validate({"path": str(folder), **more}), schema or schema_of())


def test_features_and_labels_are_the_files(folder):
    table = examples_of(source(folder)).to_pydict()
    assert table["example_id"] == [0, 1, 2, 3, 4]
    assert table["time"] == [1_000_000 * (T0 + after) for after in (0, 10, 100, 2 * DAY, 30)]
    assert table["traffic"] == table["pid"] == [PIDS[0], PIDS[0], PIDS[1], PIDS[0], PIDS[0]]
    assert table["user_id"] == [581738, 449818, 581738, 581738, None]
    assert table["cate_id"] == [6423, 6406, 6406, None, 6423]
    assert table["brand"] == [None, 95471, 95471, None, None]
    assert table["price"] == [69.5, 170.0, 170.0, None, 69.5]
    assert table["pvalue_level"] == [None] * 5
    assert table["new_user_class_level"] == [3, None, 3, 3, None], "the official header ends with a space"
    assert table["hour"] == [8, 8, 8, 8, 8]
    assert table["weekday"] == [5, 5, 5, 0, 5], "6 May 2017 was a Saturday"
    assert table["click"] == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_sequences_are_strictly_before_the_delay(folder):
    table = examples_of(source(folder)).to_pydict()
    # T0: 60 s before is the bound itself, which is excluded. Oldest first; the missing brand is 0.
    assert table["cate_his"] == [
        [6406, 6252],
        [1],
        [6406, 6252, 6251, 6250, 6253],
        [6406, 6252, 6251, 6250, 6253, 6254, 6406, 6406, 6406],
        [],
    ]
    assert table["btag_his"] == [[2, 1], [3], [2, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1, 4, 4, 4], []]
    assert table["brand_his"] == [[95471, 0], [2], [91286, 7], [1, 95471], []], "the newest two"
    assert table["pv_cate"][:3] == [[6252], [], [6252, 6251, 6250, 6253]]
    assert table["buy_brand"] == [[], [], [], [95471, 1, 95471], []]
    none = examples_of(source(folder, feedback_delay=0)).to_pydict()
    assert none["cate_his"][0] == [6406, 6252, 6251, 6250], "an event of the impression's own second is not seen"
    assert none["buy_brand"][2] == []


def test_outcomes_are_later_behaviour_on_the_ads_category_and_brand(folder):
    table = examples_of(source(folder, outcome_window=4900)).to_pydict()
    # Row 2 (T0 + 100): the buy of its own second does not count, that of T0 + 5000 is the window's last moment.
    assert table["buy"] == [0.0, 0.0, 1.0, None, None]
    assert table["cart"] == [0.0, 0.0, 0.0, None, None]
    short = examples_of(source(folder, outcome_window=4899)).to_pydict()
    assert short["buy"] == [0.0, 0.0, 0.0, None, None]
    long = examples_of(source(folder, outcome_window=3 * DAY)).to_pydict()
    assert long["buy"] == [None] * 5, "no window is over when the log ends"


def test_the_example_schema_fits(folder):
    schema = validate(Schema, read_yaml(EXAMPLES / "taobao_ad_schema.yaml"))
    own = source(folder, schema)
    good, rejects = split_rejects(examples_of(own), schema, own.periods())
    assert (good.num_rows, rejects.num_rows) == (5, 0)
    assert good["cart_brand"].to_pylist()[0] == [95471]


def test_days_are_those_of_utc_plus_8(folder):
    periods = source(folder).periods()
    assert [period.name for period in periods] == ["2017-05-06", "2017-05-08"], "days without impressions are none"
    assert periods[0].start == datetime.datetime(2017, 5, 5, 16, tzinfo=datetime.UTC)
    assert periods[0].end - periods[0].start == datetime.timedelta(days=1)
    only = source(folder, start="2017-05-07", end="2017-05-20")
    assert [period.name for period in only.periods()] == ["2017-05-08"]
    assert examples_of(only)["example_id"].to_pylist() == [3]
    with pytest.raises(DataError, match="the log has 2017-05-06 to 2017-05-08, none of it between start and end"):
        source(folder, start="2018-01-01").periods()
    with pytest.raises(ConfigError, match="start 2018-01-01 is after end 2017-01-01"):
        source(folder, start="2018-01-01", end="2017-01-01")


def test_bad_rows_are_rejected_with_a_reason_and_kill_nothing(folder):
    extra = f"581738,,1,{PIDS[0]},1,0\n581738,-5,1,{PIDS[0]},1,0\n581738,{T0},1,,1,0\n581738,{T0},1,{PIDS[0]},1,3\n"
    (folder / "raw_sample.csv").write_text(RAW_SAMPLE + extra)
    own = source(folder)
    good, rejects = split_rejects(examples_of(own), own.schema, own.periods())
    assert good["example_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert rejects.sort_by("example_id")["reason"].to_pylist() == [
        "null time",
        "negative time",
        "unknown traffic",
        "label 'click' is not 0 or 1",
    ]


@pytest.mark.parametrize("buckets", [1, 3])
def test_any_cut_of_the_files_gives_the_same_examples(folder, buckets, monkeypatch):
    whole = examples_of(source(folder))
    monkeypatch.setattr(tables_module, "PART_BYTES", 50)
    monkeypatch.setattr(buckets_module, "RUN_BYTES", 1)
    own = source(folder)
    assert len(own.parts()) > 10
    assert examples_of(own, buckets).equals(whole)


def test_gzip_and_parquet_say_the_same(folder, tmp_path_factory):
    whole = examples_of(source(folder))
    other = tmp_path_factory.mktemp("other")
    for path in folder.iterdir():
        pq.write_table(pcsv.read_csv(path), other / f"{path.stem}.parquet", row_group_size=2)
    assert pq.read_schema(other / "user_profile.parquet").names[-1] == "new_user_class_level "
    assert examples_of(source(other), 2).equals(whole)
    for path in folder.glob("*.csv"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert examples_of(source(folder), 2).equals(whole)


def synthetic(folder: Path, samples: int, behaviours: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Few users and coarse times, so that ties abound."""
    rng = np.random.default_rng(0)
    log = pd.DataFrame(
        {
            "user": rng.integers(1, 9, samples),
            "time_stamp": T0 + 60 * rng.integers(0, 300, samples),
            "adgroup_id": rng.integers(1, 6, samples),
            "pid": PIDS[0],
            "nonclk": 1,
            "clk": 0,
        }
    )
    acts = pd.DataFrame(
        {
            "user": rng.integers(1, 9, behaviours),
            "time_stamp": T0 + 60 * rng.integers(-100, 300, behaviours),
            "btag": rng.choice(["pv", "cart", "fav", "buy"], behaviours),
            "cate": rng.integers(1, 4, behaviours),
            "brand": rng.integers(1, 3, behaviours),
        }
    )
    log.to_csv(folder / "raw_sample.csv", index=False)
    acts.to_csv(folder / "behavior_log.csv", index=False)
    ads = pd.DataFrame({"adgroup_id": range(1, 6), "cate_id": [1, 2, 3, 1, 2], "campaign_id": 1, "customer": 1})
    ads.assign(brand=[1, 2, 1, 2, 1], price=1.0).to_csv(folder / "ad_feature.csv", index=False)
    return log, acts


@pytest.mark.parametrize("delay", [0, 60, 5400])
def test_sequences_and_outcomes_against_their_definition(folder, delay):
    log, acts = synthetic(folder, 150, 600)
    ads = pd.read_csv(folder / "ad_feature.csv").set_index("adgroup_id")
    table = examples_of(source(folder, feedback_delay=delay, outcome_window=1800), 2).to_pydict()
    longest = 0
    for row in log.itertuples():
        past = acts[(acts.user == row.user) & (acts.time_stamp < row.time_stamp - delay)]
        past = past.sort_values("time_stamp", kind="stable")
        assert table["cate_his"][row.Index] == past.cate.tolist()[-50:]
        assert table["pv_cate"][row.Index] == past[past.btag == "pv"].cate.tolist()[-50:]
        longest = max(longest, len(past))
        ad = ads.loc[row.adgroup_id]
        then = acts[(acts.user == row.user) & (acts.cate == ad.cate_id) & (acts.brand == ad.brand)]
        then = then[(then.time_stamp > row.time_stamp) & (then.time_stamp <= row.time_stamp + 1800)]
        known = row.time_stamp + 1800 <= log.time_stamp.max()
        assert table["buy"][row.Index] == (float((then.btag == "buy").any()) if known else None)
    assert longest > 50


def test_only_the_files_that_the_schema_needs_are_read(folder):
    for name in ("ad_feature", "user_profile", "behavior_log"):
        (folder / f"{name}.csv").unlink()
    features = [{"name": "user_id", "kind": "sparse", "table": "user"}]
    lean = schema_of(features=features, tasks=[{"name": "click"}], tables={"user": {"rows": 10}})
    assert examples_of(source(folder, lean))["click"].to_pylist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"behavior_log\.csv \(or \.csv\.gz, \.parquet\) is missing; download"):
        source(folder).parts()


def test_errors_name_files_and_columns(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder; download and unpack raw_sample"):
        source(tmp_path / "nowhere").periods()
    log, behaviours = folder / "raw_sample.csv", folder / "behavior_log.csv"
    log.write_text(RAW_SAMPLE.replace("clk\n", "click\n"))
    with pytest.raises(DataError, match=r"raw_sample\.csv: column 'clk' is missing; did you mean 'click'"):
        source(folder).parts()
    log.write_text(RAW_SAMPLE.replace(f"{T0 + 10}", "noon"))
    with pytest.raises(DataError, match=r"raw_sample\.csv: cannot be read \(.*noon"):
        source(folder).periods()
    log.write_text(RAW_SAMPLE.split("\n")[0] + "\n")
    with pytest.raises(DataError, match=r"raw_sample\.csv: no row has a time_stamp in seconds"):
        source(folder).periods()
    log.write_text(RAW_SAMPLE)
    behaviours.write_text(BEHAVIOR_LOG.replace(",fav,", ",favourite,"))
    with pytest.raises(DataError, match="behavior_log: column 'btag' has 'favourite'; known: pv, cart, fav, buy"):
        examples_of(source(folder))
    behaviours.write_text(BEHAVIOR_LOG)
    (folder / "ad_feature.csv").write_text(AD_FEATURE.replace("6406", "shoes"))
    with pytest.raises(DataError, match=r"ad_feature\.csv: cannot be read \(.*shoes"):
        examples_of(source(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [{"name": "pv_cat", "kind": "sequence", "table": "cate"}]}, "no feature 'pv_cat'; did you mean"),
        ({"features": [{"name": "pv_cate", "kind": "sparse", "table": "cate"}]}, "'pv_cate' is a list of ids"),
        ({"features": [{"name": "brand", "kind": "sequence"}]}, "'brand' is one value, not a list"),
        (
            {"features": [{"name": "price", "kind": "sparse", "table": "cate"}]},
            "'price' is a number; its kind is dense",
        ),
        ({"features": [{"name": "pid", "kind": "sparse", "table": "cate"}]}, "write `id_type: string`"),
        ({"tasks": [{"name": "clicks"}]}, "no task 'clicks'; did you mean 'click'"),
        ({"tasks": [{"name": "buy", "kind": "regression"}]}, "task 'buy' is binary, not regression"),
    ],
)
def test_schemas_that_do_not_fit_are_refused(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        source(folder, schema_of(**change))


@pytest.mark.ray
def test_prepare_on_ray(folder, tmp_path, ray_session):
    """The whole way: dealt to buckets by one set of tasks, built by another, nothing left behind."""
    store = ExampleStore(tmp_path / "store")
    own = source(folder)
    own.buckets = lambda: 3
    manifests = prepare(own, own.schema, store, lanes=2)
    assert [(manifest.period, manifest.rows("impression")) for manifest in manifests] == [
        ("2017-05-06", 4),
        ("2017-05-08", 1),
    ]
    rows = pa.concat_tables(pq.read_table(path) for _, path in store.files("2017-05-06", "impression"))
    assert dict(zip(rows["example_id"].to_pylist(), rows["cate_his"].to_pylist(), strict=True))[0] == [6406, 6252]
    assert not (store.root / ".staging").exists()
