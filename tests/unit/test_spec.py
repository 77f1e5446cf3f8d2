"""The model spec: what is accepted, what is defaulted, and how a wrong field is named."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from orchestrator.errors import SpecError
from orchestrator.spec import DTYPES, ModelSpec, load_spec, parse_spec

MINIMAL: dict[str, Any] = {
    "factory": "net:build",
    "input": {"shape": [32, 32, 3], "dtype": "UINT8"},
    "classes": ["cat", "dog"],
    "reference": "reference.parquet",
}


def _folder(tmp_path: Path, values: dict[str, Any]) -> Path:
    (tmp_path / "reference.parquet").write_bytes(b"")
    (tmp_path / "w.safetensors").write_bytes(save({"w": np.zeros(2, np.float32)}))
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_four_keys_are_enough_and_the_rest_is_defaulted() -> None:
    spec = parse_spec(MINIMAL)
    assert (spec.input_shape, spec.input_dtype, spec.layout) == ((32, 32, 3), "UINT8", "HWC")
    assert (spec.classes, spec.num_classes, spec.numpy_dtype) == (("cat", "dog"), 2, np.dtype(np.uint8))
    assert (spec.name, spec.task, spec.kwargs, spec.weights) == ("model", "classification", {}, None)
    assert (spec.metric, spec.features, spec.columns, spec.folder) == ("accuracy", None, None, None)


def test_a_file_is_read_with_paths_relative_to_its_folder(tmp_path: Path) -> None:
    spec = load_spec(_folder(tmp_path, {**MINIMAL, "weights": "w.safetensors"}))
    assert spec.folder == tmp_path
    assert spec.reference == "reference.parquet"
    assert spec.locate(spec.reference) == str(tmp_path / "reference.parquet")
    assert spec.locate("s3://bucket/x") == "s3://bucket/x"
    assert spec.name == tmp_path.name


@pytest.mark.parametrize("key", ["factory", "input", "classes", "reference"])
def test_a_missing_required_key_is_named(key: str) -> None:
    with pytest.raises(SpecError, match=rf"^{key} is required"):
        parse_spec({k: v for k, v in MINIMAL.items() if k != key})


WRONG = [
    ({"wieghts": "x"}, r"unknown key 'wieghts'.*known keys: spec_version, name"),
    ({"task": "regression"}, r"task must be classification.*'regression'"),
    ({"spec_version": 2}, r"spec_version must be 1; got 2"),
    ({"name": "a/b"}, r"name must read"),
    ({"factory": "net.build"}, r"factory must read package.module:callable; got 'net.build'"),
    ({"factory": 3}, r"factory must read"),
    ({"kwargs": [1]}, r"kwargs must map"),
    ({"kwargs": {"a": {1: 2}}}, r"kwargs must be plain"),
    ({"kwargs": {"a": object()}}, r"kwargs must be plain"),
    ({"weights": "w.pt"}, r"weights must be a .safetensors file.*pickle.*'w.pt'.*convert"),
    ({"weights": "w.bin"}, r"pickle"),
    ({"weights": "s3://b/w.pth"}, r"pickle"),
    ({"reference": ""}, r"reference must be a non-empty text"),
    ({"classes": ["cat"]}, r"classes must name at least two"),
    ({"classes": ["cat", "cat"]}, r"classes must be unique; cat"),
    ({"classes": ["cat", True]}, r"classes must be printable texts; got True; put it in quotes"),
    ({"classes": ["cat", "a\x85b"]}, r"classes must be printable texts"),
    ({"classes": "cat"}, r"classes must be a list"),
    ({"metric": "f1:bird"}, r"metric must be .*'f1:bird'"),
    ({"metric": ["accuracy"]}, r"metric must be"),
    ({"metric": {"cost": {"bird": {"cat": 1}}}}, r"metric.cost must use the names in classes; got 'bird'"),
    ({"metric": {"cost": {"cat": 1}}}, r"metric.cost must map"),
    ({"features": 3}, r"features must be a non-empty text"),
    ({"input": [32]}, r"input must be a mapping"),
    ({"input": {"shape": [32], "dtype": "FP32", "size": 1}}, r"unknown key 'size' in input"),
    ({"input": {"shape": [], "dtype": "FP32"}}, r"input.shape must list"),
    ({"input": {"shape": [32, 0], "dtype": "FP32"}}, r"input.shape must list"),
    ({"input": {"shape": [True], "dtype": "FP32"}}, r"input.shape must list"),
    ({"input": {"shape": [32], "dtype": "float32"}}, r"input.dtype must be one of .*FP32.*'float32'"),
    ({"input": {"shape": [32], "dtype": "FP32", "layout": "HWC"}}, r"input.layout must be one of F for shape \[32\]"),
    ({"input": {"shape": [2], "dtype": "FP32", "columns": ["a"]}}, r"input.columns must name each"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_field_is_rejected_with_field_expectation_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec({**MINIMAL, **change})


def test_layout_follows_from_the_shape() -> None:
    def layout(*shape: int) -> str:
        return parse_spec({**MINIMAL, "input": {"shape": list(shape), "dtype": "FP32"}}).layout

    assert [layout(8, 8, 1), layout(3, 8, 8), layout(30), layout(8, 8), layout(2, 2, 2, 2)] == [
        *("HWC", "CHW", "F", "HW", ""),
    ]


def test_digits_may_be_written_as_numbers() -> None:
    assert parse_spec({**MINIMAL, "classes": [0, 1]}).classes == ("0", "1")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip as torch.save makes", b"\x80\x02}q\x00.", b"", b"\xff" * 20])
def test_a_pickle_named_safetensors_is_refused_by_its_content(tmp_path: Path, content: bytes) -> None:
    path = _folder(tmp_path, {**MINIMAL, "weights": "w.safetensors"})
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(SpecError, match=r"weights must be safetensors; w.safetensors holds"):
        load_spec(path)


@pytest.mark.parametrize("missing", ["reference.parquet", "w.safetensors"])
def test_a_named_file_that_is_missing_is_said_at_load(tmp_path: Path, missing: str) -> None:
    path = _folder(tmp_path, {**MINIMAL, "weights": "w.safetensors"})
    (tmp_path / missing).unlink()
    with pytest.raises(SpecError, match=f"must be an existing file; got '{missing}'"):
        load_spec(path)


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text", "", "\x00"])
def test_a_file_that_is_no_yaml_mapping_is_a_spec_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(SpecError, match="model spec must be"):
        load_spec(tmp_path / "model.yaml")


def test_a_missing_or_binary_file_is_a_spec_error(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "binary.yaml"):
        with pytest.raises(SpecError, match="readable YAML"):
            load_spec(tmp_path / name)


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def _specs(draw: st.DrawFn) -> ModelSpec:
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    classes = draw(st.lists(st.text("ab é-0:#", min_size=1, max_size=6), min_size=2, max_size=4, unique=True))
    metrics = ["accuracy", "balanced_accuracy", f"f1:{classes[0]}", {"cost": {classes[0]: {classes[1]: 2.5}}}]
    values = {
        "factory": "pkg.net:Net.build",
        "input": {"shape": shape, "dtype": draw(st.sampled_from(sorted(DTYPES)))},
        "classes": classes,
        "reference": draw(st.sampled_from(["r.parquet", "/data/r.parquet", "s3://bucket/r.parquet"])),
        "kwargs": draw(st.dictionaries(st.text(max_size=5), _plain, max_size=2)),
        "weights": draw(st.sampled_from([None, "w.safetensors"])),
        "metric": draw(st.sampled_from(metrics)),
        "features": draw(st.sampled_from([None, "avgpool"])),
        "name": draw(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,8}\Z")),
    }
    return parse_spec(values)


@settings(max_examples=40)
@given(_specs())
def test_a_spec_survives_the_round_trip_through_yaml(spec: ModelSpec) -> None:
    text = yaml.safe_dump(spec.to_dict())
    assert ModelSpec.from_dict(yaml.safe_load(text)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from([*MINIMAL, "metric", "kwargs", "name", "weights"]), _plain))
def test_no_value_whatsoever_escapes_as_another_error(change: dict[str, Any]) -> None:
    with contextlib.suppress(SpecError):
        parse_spec({**MINIMAL, **change})
