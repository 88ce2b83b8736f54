from __future__ import annotations

import json
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfm.client.wire import ARROW, JSON, Scored, to_row, to_table, write_stream, write_streams
from rayfm.config import DataError
from rayfm.serving.http.codecs import MAX_JSON_VALUES, Payload, check_finite, encode, media_of, reply_media
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem

LIMITS = LimitsConfig(max_candidates=50, max_rows=100, max_list_values=200, max_id_bytes=20)
USER = pa.table({"user": [7], "history": [["a", "b"]]})
CANDIDATES = pa.table({"ad": pa.array(["x", "y", "x"]).dictionary_encode(), "price": [1.0, None, 3.0]})
STUDENT = write_streams([USER, CANDIDATES])


def arrow(body: bytes) -> Payload:
    return Payload(body, ARROW, LIMITS)


def text(value: object) -> Payload:
    return Payload(value if isinstance(value, bytes) else json.dumps(value).encode(), JSON, LIMITS)


def test_a_student_request_is_two_tables():
    user, candidates = arrow(STUDENT).student()
    assert user.equals(USER)
    assert candidates.equals(CANDIDATES)
    found = text({"user": {"user": 7, "history": ["a", "b"]}, "candidates": {"ad": ["x"], "price": [None]}}).student()
    assert found[0].to_pylist() == USER.to_pylist()
    assert found[1].to_pylist() == [{"ad": "x", "price": None}]


def test_a_teacher_request_is_one_table():
    assert arrow(write_stream(CANDIDATES)).rows().equals(CANDIDATES)
    assert text({"rows": {"a": [1, 2], "b": [[], [1]]}}).rows().to_pylist() == [{"a": 1, "b": []}, {"a": 2, "b": [1]}]


def test_a_request_of_several_batches_is_whole():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, CANDIDATES.schema) as writer:
        for start in range(3):
            writer.write_table(CANDIDATES.slice(start, 1))
    assert arrow(sink.getvalue().to_pybytes()).rows().to_pylist() == CANDIDATES.to_pylist()


def test_every_truncation_is_noticed():
    """Also those at a message's end, which Arrow itself takes for the end of the stream."""
    for cut in range(len(STUDENT)):
        with pytest.raises(DataError):
            arrow(STUDENT[:cut]).student()
    with pytest.raises(DataError, match="1 of 2 Arrow IPC streams"):
        arrow(write_stream(USER)).student()
    with pytest.raises(DataError, match="bytes follow"):
        arrow(STUDENT + b"x").student()
    with pytest.raises(DataError, match="bytes follow"):
        arrow(STUDENT).rows()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_end_in_an_answer_or_a_refusal(data):
    body = bytearray(STUDENT)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        user, candidates = arrow(bytes(body)).student()
    except (DataError, Problem):
        return
    user.validate(full=True)
    candidates.validate(full=True)
    assert candidates.num_rows <= LIMITS.max_candidates


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(noise):
    with pytest.raises((DataError, Problem)):
        arrow(noise).rows()
    with pytest.raises((DataError, Problem)):
        text(noise).rows()


def compressed(codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": np.zeros(90)})
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_buffers_are_refused(codec):
    with pytest.raises(DataError, match="compressed; send it without"):
        arrow(compressed(codec)).rows()


def test_rows_are_counted_before_they_take_memory():
    """A column of nulls, or of lists of nulls, stands for any number of rows in no bytes."""
    nulls = pa.table({"a": pa.nulls(10**9)})
    with pytest.raises(Problem) as many:
        arrow(write_stream(nulls)).rows()
    assert many.value.status == 413
    wide = pa.FixedSizeListArray.from_arrays(pa.nulls(10**9), 10**9)
    with pytest.raises(Problem, match="column 'a' holds more than 200 values"):
        arrow(write_stream(pa.table({"a": wide}))).rows()
    in_parts = pa.table({"a": pa.chunked_array([[1] * 60, [1] * 60])})
    with pytest.raises(Problem, match="more than 100 rows"):
        arrow(write_stream(in_parts)).rows()


def test_long_texts_are_refused_wherever_they_stand():
    long = "x" * 21
    for column in (pa.array([long]), pa.array([[long]]), pa.array([long]).dictionary_encode()):
        with pytest.raises(Problem, match="column 'a' holds a text of 21 bytes; at most 20"):
            arrow(write_stream(pa.table({"a": column}))).rows()
    with pytest.raises(Problem, match="text of 21 bytes"):
        text({"rows": {"a": [long]}}).rows()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"b": 1}]),
        pa.array([b"bytes"]),
        pa.array([[[1]]]),
        pa.array(["a"], pa.string_view()),
        pa.array([["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.array([0], pa.timestamp("us")),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16))),
        pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([1])),
    ],
    ids=lambda column: str(column.type),
)
def test_types_that_no_feature_has_are_refused(column):
    with pytest.raises(DataError, match="column 'a' has type"):
        arrow(write_stream(pa.table({"a": column}))).rows()


def test_a_dictionary_index_out_of_range_is_refused():
    bad = pa.DictionaryArray.from_arrays(pa.array([0, 9]), pa.array(["x"]), safe=False)
    with pytest.raises(DataError, match="no Arrow IPC stream"):
        arrow(write_stream(pa.table({"a": bad}))).rows()


def test_a_column_twice_is_refused():
    with pytest.raises(DataError, match="column 'a' stands twice"):
        arrow(write_stream(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]))).rows()
    with pytest.raises(DataError, match="'a' stands twice"):
        text(b'{"rows": {"a": [1], "a": [2]}}').rows()


def test_one_user_and_every_column_once():
    with pytest.raises(DataError, match="the user's table has 2 rows"):
        arrow(write_streams([pa.table({"user": [1, 2]}), CANDIDATES])).student()
    with pytest.raises(DataError, match="column 'ad' is given for the user and for the candidates"):
        arrow(write_streams([pa.table({"ad": ["x"]}), CANDIDATES])).student()
    user, _ = arrow(write_streams([pa.table({}), CANDIDATES])).student()
    assert user.num_columns == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "lacks 'rows'"),
        (b'{"rows": {}, "row": 1}', "unknown key 'row'; did you mean 'rows'"),
        (b'{"rows": [1]}', '"rows" is no object'),
        (b'{"rows": {"a": 1}}', "column 'a' of 'rows' is no list"),
        (b'{"rows": {"a": [1], "b": [1, 2]}}', "column 'b' of 'rows' has 2 values, the one before it 1"),
        (b'{"rows": {"a": [1, "x"]}}', "column 'a' of 'rows' mixes types"),
        (b'{"rows": {"a": [[1], 2]}}', "column 'a' of 'rows' mixes types"),
        (b'{"rows": {"a": [9223372036854775808]}}', "beyond int64"),
        (b'{"rows": {"a": [-9223372036854775809]}}', "beyond int64"),
        (b'{"rows": {"a": [' + b"9" * 5000 + b"]}}", "no JSON"),
        (b'{"rows": {"a": [1e999]}}', "no finite number"),
        (b'{"rows": {"a": [NaN]}}', "NaN is no JSON"),
        (b'{"rows": {"a": [-Infinity]}}', "-Infinity is no JSON"),
        (b'{"rows": {"a": ["\\ud800"]}}', "no Unicode"),
        (b'{"rows": {"\\ud800": [1]}}', "no Unicode"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json_is_refused_with_its_reason(body, said):
    with pytest.raises(DataError, match=said):
        text(body).rows()


def test_json_rows_are_limited():
    with pytest.raises(Problem, match="more than 50 rows") as many:
        text({"user": {}, "candidates": {"a": [1] * 51}}).student()
    assert many.value.status == 413
    with pytest.raises(DataError, match='"user" is no object'):
        text({"user": [1], "candidates": {}}).student()


def test_content_types():
    assert media_of("application/json; charset=utf-8", None) == JSON
    assert media_of(ARROW, "identity") == ARROW
    for content, encoding in ((None, None), ("text/plain", None), ("application/x-pickle", None), (JSON, "gzip")):
        with pytest.raises(Problem) as bad:
            media_of(content, encoding)
        assert bad.value.status == 415
    assert reply_media(None, JSON) == JSON
    assert reply_media("*/*", ARROW) == ARROW
    assert reply_media(f"text/html, {JSON};q=0.9", ARROW) == JSON


def test_replies_name_their_version():
    scored = Scored("v1", pa.table({"click": pa.array([0.25, 0.5], pa.float32())}))
    assert json.loads(encode(scored, JSON)) == {"version": "v1", "predictions": {"click": [0.25, 0.5]}}
    found = pa.ipc.open_stream(encode(scored, ARROW)).read_all()
    assert found.schema.metadata == {b"x-rayfm-version": b"v1"}
    assert found.to_pylist() == scored.predictions.to_pylist()


def test_a_prediction_that_is_no_number_is_refused():
    good = pa.table({"click": pa.array([0.5], pa.float32())})
    assert check_finite(good) is good
    with pytest.raises(DataError, match="row 1: the prediction 'click' is not finite"):
        check_finite(pa.table({"click": pa.array([0.5, np.nan], pa.float32())}))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([0, 0, np.inf, 0], pa.float32()), 2)
    with pytest.raises(DataError, match="row 1: the prediction 'representation'"):
        check_finite(pa.table({"representation": vectors}))


def test_mappings_become_tables():
    assert to_row({"user": 7, "history": ["a"]}).to_pylist() == [{"user": 7, "history": ["a"]}]
    assert to_table({"ad": ["a", "b"]}).num_rows == 2
    assert to_table(CANDIDATES) is CANDIDATES


def test_many_columns_are_checked_in_one_go():
    """A body of some hundred kilobytes must not hold the scoring thread: what is checked grows with its length."""
    names = [f"c{number}" for number in range(200_000)]
    twice = ", ".join(f'"{name}": 1' for name in [*names, names[-1]])
    begin = time.process_time()
    with pytest.raises(DataError, match="'c199999' stands twice"):
        text(f'{{"rows": {{{twice}}}}}'.encode()).rows()
    many = write_stream(pa.table([pa.nulls(1)] * 10_001, [f"c{number}" for number in range(10_001)]))
    with pytest.raises(DataError, match="a table has 10001 columns"):
        arrow(many).rows()
    assert time.process_time() - begin < 30  # quadratic, it takes many minutes


@pytest.mark.parametrize("rows", [0, 1, 4096, 10_000])
def test_json_replies_hold_every_row(rows):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * rows, dtype=np.float32)), 2)
    table = pa.table({"click": pa.array(np.arange(rows) / 8, pa.float32()), "représentation": vectors})
    assert json.loads(encode(Scored("v1", table), JSON)) == {"version": "v1", "predictions": table.to_pydict()}


def test_json_replies_are_limited():
    table = pa.table(
        {"click": pa.nulls(MAX_JSON_VALUES // 2 + 1, pa.float32()), "like": pa.nulls(MAX_JSON_VALUES // 2 + 1)}
    )
    with pytest.raises(Problem, match="more than 1000000 numbers; ask for application/vnd") as refused:
        encode(Scored("v1", table), JSON)
    assert refused.value.status == 413
    assert encode(Scored("v1", table), ARROW)
