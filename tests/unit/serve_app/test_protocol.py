"""What a request must look like; every other one is refused with a message that says what is wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import RequestError
from serve_app.protocol import Contract, decompress, parse, render

CONTRACT = Contract("m", (2, 3), "UINT8", 4, max_rows=5)
FLOATS = Contract("m", (3,), "FP32", 2)


def tensor(**changes: Any) -> dict[str, Any]:
    value = {"name": "input", "shape": [1, 2, 3], "datatype": "UINT8", "data": [1, 2, 3, 4, 5, 6], **changes}
    return {key: item for key, item in value.items() if item is not ...}


def body(*tensors: dict[str, Any], **extra: Any) -> bytes:
    return json.dumps({"inputs": list(tensors), **extra}).encode()


def binary(values: np.ndarray, name: str = "UINT8", **extra: Any) -> tuple[bytes, str]:
    raw = values.tobytes()
    head = body(
        tensor(shape=list(values.shape), datatype=name, data=..., parameters={"binary_data_size": len(raw)}), **extra
    )
    return head + raw, str(len(head))


@pytest.mark.parametrize("data", [list(range(12)), np.arange(12).reshape(2, 2, 3).tolist()])
def test_flat_and_nested_json_give_the_same_array(data: list[Any]) -> None:
    got = parse(body(tensor(shape=[2, 2, 3], data=data)), None, CONTRACT).inputs
    np.testing.assert_array_equal(got, np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert got.dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "dtype"), [("FP16", "<f2"), ("FP32", "<f4"), ("FP64", "<f8"), ("INT64", "<i8"), ("BOOL", "?")]
)
def test_binary_and_json_of_every_datatype_agree(name: str, dtype: str) -> None:
    values = np.array([[1, 0, 1]], dtype=dtype)
    contract = Contract("m", (3,), name, 2)
    raw, length = binary(values, name)
    np.testing.assert_array_equal(parse(raw, length, contract).inputs, values)
    listed = body(tensor(shape=[1, 3], datatype=name, data=values.tolist()))
    np.testing.assert_array_equal(parse(listed, None, contract).inputs, values)


def test_large_binary_body_is_not_copied() -> None:
    values = np.zeros((5, 2, 3), dtype=np.uint8)
    raw, length = binary(values)
    assert not parse(raw, length, CONTRACT).inputs.flags.owndata


BAD = {
    "not JSON": (b"{", None, 400, "JSON"),
    "no UTF-8": (b"\xff\xfe\x00", None, 400, "JSON"),
    "too deep": (b"[" * 100_000, None, 400, "JSON"),
    "a list": (b"[]", None, 400, "object"),
    "no inputs": (b"{}", None, 400, "inputs"),
    "input is no object": (b'{"inputs": [3]}', None, 400, "inputs"),
    "wrong name": (body(tensor(name="image")), None, 400, "'image'"),
    "two inputs": (body(tensor(), tensor()), None, 400, "2 tensors"),
    "wrong datatype": (body(tensor(datatype="FP32")), None, 400, "'FP32'"),
    "wrong shape": (body(tensor(shape=[1, 3, 2])), None, 400, "[N, 2, 3]"),
    "shape of words": (body(tensor(shape=["1", 2, 3])), None, 400, "shape"),
    "shape of booleans": (body(tensor(shape=[True, 2, 3])), None, 400, "shape"),
    "0 rows": (body(tensor(shape=[0, 2, 3], data=[])), None, 400, "1 to 5 rows"),
    "negative rows": (body(tensor(shape=[-1, 2, 3])), None, 400, "1 to 5 rows"),
    "10,000 rows": (body(tensor(shape=[10_000, 2, 3])), None, 400, "1 to 5 rows"),
    "too few values": (body(tensor(data=[1])), None, 400, "6 values"),
    "ragged": (body(tensor(data=[[[1, 2, 3], [4, 5]]])), None, 400, "ragged"),
    "nested too deep": (body(tensor(data=[[[[1], [2], [3]], [[4], [5], [6]]]])), None, 400, "data of input"),
    "words": (body(tensor(data=["1"] * 6)), None, 400, "numbers"),
    "null": (body(tensor(data=[None] * 6)), None, 400, "numbers"),
    "fractions for integers": (body(tensor(data=[0.5] * 6)), None, 400, "numbers"),
    "256 for UINT8": (body(tensor(data=[256] * 6)), None, 400, "range"),
    "data is no list": (body(tensor(data=5)), None, 400, "a number"),
    "no data": (body(tensor(data=...)), None, 400, "neither"),
    "header length of a word": (body(tensor()), "abc", 400, "Inference-Header-Content-Length"),
    "header length negative": (body(tensor()), "-1", 400, "Inference-Header-Content-Length"),
    "header length past the end": (body(tensor()), "99999", 400, "Inference-Header-Content-Length"),
    "header length too short": (body(tensor()), "5", 400, "JSON"),
    "bytes after JSON": (body(tensor()) + b"xx", str(len(body(tensor()))), 400, "2 more bytes"),
    "size without a header": (body(tensor(data=..., parameters={"binary_data_size": 6})), None, 400, "must be given"),
    "shared memory": (body(tensor(parameters={"shared_memory_region": "r"})), None, 400, "shared memory"),
    "unknown output": (body(tensor(), outputs=[{"name": "scores"}]), None, 400, "'scores'"),
    "output twice": (body(tensor(), outputs=[{"name": "label"}] * 2), None, 400, "twice"),
    "outputs no list": (body(tensor(), outputs="label"), None, 400, "outputs"),
    "classification": (
        body(tensor(), outputs=[{"name": "label", "parameters": {"classification": 3}}]),
        None,
        400,
        "classification",
    ),
    "parameters no object": (body(tensor(), parameters=[]), None, 400, "parameters"),
    "segment no text": (body(tensor(), parameters={"segment": 3}), None, 400, "segment"),
    "monitor no flag": (body(tensor(), parameters={"monitor": "no"}), None, 400, "monitor"),
    "id no text": (body(tensor(), id=3), None, 400, "id"),
    "id with a line break": (body(tensor(), id="a\nb"), None, 400, "id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_with_a_message_that_names_the_field(case: str) -> None:
    raw, length, status, word = BAD[case]
    with pytest.raises(RequestError) as caught:
        parse(raw, length, CONTRACT)
    assert caught.value.status == status
    assert word in str(caught.value)
    assert len(str(caught.value)) < 300


def test_truncated_binary_is_refused() -> None:
    raw, length = binary(np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(RequestError, match=r"binary_data_size .* 11 bytes"):
        parse(raw[:-1], length, CONTRACT)


def test_binary_size_that_contradicts_the_shape_is_refused() -> None:
    head = body(tensor(data=..., parameters={"binary_data_size": 5}))
    with pytest.raises(RequestError, match=r"must be 6 bytes"):
        parse(head + b"12345", str(len(head)), CONTRACT)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1e39"])
def test_input_that_is_not_finite_is_refused(value: str) -> None:
    raw = b'{"inputs":[{"name":"input","shape":[1,3],"datatype":"FP32","data":[1,%s,2]}]}' % value.encode()
    with pytest.raises(RequestError, match="finite"):
        parse(raw, None, FLOATS)


def test_binary_nan_is_refused() -> None:
    raw, length = binary(np.array([[1, np.nan, 2]], dtype="<f4"), "FP32")
    with pytest.raises(RequestError, match="1 of 3"):
        parse(raw, length, FLOATS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(
    [*("id", "inputs", "outputs", "parameters", "name", "shape", "datatype", "data"), "binary_data_size", "monitor"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(fields, json_values, max_size=5), st.dictionaries(fields, json_values, max_size=5))
def test_no_mutated_request_raises_anything_but_a_request_error(top: dict[str, Any], inner: dict[str, Any]) -> None:
    request = {"inputs": [{**tensor(), **inner}], **top}
    with contextlib.suppress(RequestError):
        parse(json.dumps(request).encode(), None, CONTRACT)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.none() | st.text(max_size=6) | st.integers(0, 250).map(str))
def test_no_bytes_raise_anything_but_a_request_error(raw: bytes, length: str | None) -> None:
    with pytest.raises(RequestError):
        parse(raw, length, CONTRACT)


@pytest.mark.parametrize("pack", [("gzip", gzip.compress), ("deflate", zlib.compress), ("", bytes)])
def test_compressed_bodies_are_opened(pack: tuple[str, Any]) -> None:
    assert decompress(pack[1](b"abc" * 100), pack[0], 1000) == b"abc" * 100


def test_compressed_body_that_grows_too_large_is_refused_before_it_has_grown() -> None:
    with pytest.raises(RequestError) as caught:
        decompress(gzip.compress(b"\0" * 50_000_000), "gzip", 1000)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("raw", "encoding", "status"),
    [(b"nope", "gzip", 400), (gzip.compress(b"abc" * 99, mtime=0)[:-9], "gzip", 400), (b"", "br", 415)],
    ids=["no gzip", "cut short", "unknown encoding"],  # xdist workers must collect equal names
)
def test_broken_or_unknown_compression_is_refused(raw: bytes, encoding: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        decompress(raw, encoding, 1000)
    assert caught.value.status == status


LOGITS = np.array([[1.0, 3.0, 2.0, 0.0], [0.5, 0.0, 0.0, 0.0]], dtype=np.float32)


def test_json_reply_carries_three_outputs_with_identity() -> None:
    asked = parse(body(tensor(), id="x"), None, CONTRACT)
    raw, head = render(asked, "m", "abc", "x", {"generation": 3, "feedback_token": "t"}, LOGITS)
    value = json.loads(raw)
    assert head is None
    assert (value["model_version"], value["id"], value["parameters"]["generation"]) == ("abc", "x", 3)
    named = {o["name"]: o for o in value["outputs"]}
    assert named["label"] == {"name": "label", "shape": [2], "datatype": "INT64", "data": [1, 0]}
    np.testing.assert_array_equal(np.array(named["logits"]["data"], np.float32).reshape(2, 4), LOGITS)
    assert np.allclose(np.array(named["probabilities"]["data"]).reshape(2, 4).sum(1), 1)


def test_outputs_come_in_the_form_each_was_asked_for() -> None:
    wanted = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "logits"}]
    asked = parse(body(tensor(), outputs=wanted, parameters={"binary_data_output": True}), None, CONTRACT)
    raw, head = render(asked, "m", "base", "i", {}, LOGITS)
    assert head is not None
    value = json.loads(raw[:head])
    assert [o["name"] for o in value["outputs"]] == ["label", "logits"]
    assert value["outputs"][0]["data"] == [1, 0]
    assert value["outputs"][1]["parameters"] == {"binary_data_size": 32}
    np.testing.assert_array_equal(np.frombuffer(raw[head:], "<f4").reshape(2, 4), LOGITS)


def test_logits_that_are_not_finite_are_a_server_error() -> None:
    asked = parse(body(tensor()), None, CONTRACT)
    with pytest.raises(RequestError) as caught:
        render(asked, "m", "base", "i", {}, np.full((1, 4), np.nan, np.float32))
    assert caught.value.status == 500
