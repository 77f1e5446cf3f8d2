"""Bad input of every kind: one line that names it, exit code 2, no traceback, and nothing was started or written."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from orchestrator.cli import demo
from orchestrator.cli.main import run
from orchestrator.datasets import write_dataset
from orchestrator.messages import Verdict

KEYS = ["schema_version", "verdict", "reason", "provisional", "drift", "accuracy", "recovered", "seconds", "adapter"]
KEYS += ["trials", "seeds"]
SECONDS = ["detect", "cold_start", "search", "train", "gate", "canary", "rollout", "total"]
ADAPTER = ["digest", "adapter_rank", "placement", "learning_rate", "objective", "parameters"]
QUICK = ["--set", "num_trials=1", "--set", "trial_epochs=1", "--set", "bake_s=1"]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """It ends in one line on stderr that holds `words`, with exit code 2."""
    capsys.readouterr()
    assert run(arguments) == 2, arguments
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"


@pytest.fixture(scope="module")
def model(stripes: Path) -> str:
    return (stripes / "model.yaml").read_text()


SPECS = {
    "unknown key": (lambda text: text + "colour: red\n", ("colour", "spec_version")),
    "broken YAML": (lambda text: text + "a: [1\n b: {", ("YAML",)),
    "a pickle by name": (lambda text: text.replace("weights.safetensors", "w.pt"), ("safetensors", "w.pt")),
    "a pickle inside": (lambda text: text.replace("weights.safetensors", "p.safetensors"), ("pickle",)),
    "weights that do not fit": (lambda text: text.replace("weights.safetensors", "m.safetensors"), ("head.weight",)),
    "absent reference": (lambda text: text.replace("reference.parquet", "none.parquet"), ("none.parquet",)),
    "negative shape": (lambda text: text.replace("[16, 16, 3]", "[-16, 16, 3]"), ("input.shape", "-16")),
    "too few classes": (lambda text: text.replace("diagonal, checker", "diagonal"), ("labels", "0..2")),
    "unknown factory": (lambda text: text.replace(":build", ":nothing"), ("factory", "nothing")),
    "unknown kwargs": (lambda text: text + "kwargs: {zzz: 1}\n", ("kwargs", "zzz")),
    "unknown features": (lambda text: text + "features: nope\n", ("features", "nope")),
    "another task": (lambda text: text.replace("task: classification", "task: detection"), ("task", "detection")),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_bad_spec_is_named(stripes: Path, model: str, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, words = SPECS[name]
    torch.save({"a": 1}, stripes / "w.pt")
    torch.save({"a": torch.zeros(3)}, stripes / "p.safetensors")
    save_file({"head.weight": torch.zeros(2, 2)}, stripes / "m.safetensors")
    (stripes / "bad.yaml").write_text(change(model))
    traffic = ["--traffic", str(stripes / "drifted.parquet")]
    refused(capsys, ["rehearse", "--model", str(stripes / "bad.yaml"), *traffic], *words)
    assert run(["doctor", "--model", str(stripes / "bad.yaml")]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "some"], ("--labels", "some")),
        (["--labels=-3"], ("--labels", "-3")),
        (["--set", "bake"], ("--set", "bake")),
        (["--set", "colour=1"], ("colour", "bake_s")),
        (["--set", "bake_s=-1"], ("bake_s", ">= 0", "-1")),
        (["--set", "num_trials=many"], ("num_trials", "whole number", "many")),
        (["--set", "bake_s=.nan"], ("bake_s", "finite", "nan")),
        (["--set", "mode=[1"], ("mode", "[1")),
        (["--storage", "ftp://x"], ("ftp://x",)),
        (["--report", "/proc/nowhere/x.json"], ("--report", "/proc/nowhere")),
        (["--eval", "absent.parquet"], ("absent.parquet",)),
    ],
)
def test_a_bad_option_is_named(
    stripes: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    files = ["--model", str(stripes / "model.yaml"), "--traffic", str(stripes / "drifted.parquet")]
    refused(capsys, ["rehearse", *files, *arguments], *words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--port", "-1"], "--port"),
        (["--port", "70000"], "--port"),
        (["--timeout", "-5"], "--timeout"),
        (["--replicas", "0"], "--replicas"),
        (["--requests", "-1"], "--requests"),
        (["--drifted", "x.parquet"], "--model"),
        (["--report", "/proc/nowhere/x.json"], "--report"),
    ],
)
def test_a_bad_option_of_the_demo_is_named_before_anything_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    refused(capsys, ["demo", *arguments], word)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "ftp://x", "http://[bad"])
def test_an_unreachable_url_is_named(capsys: pytest.CaptureFixture[str], url: str) -> None:
    for command in (["status"], ["drift"], ["history"], ["pause", "--reason", "x"], ["rollback", "--reason", "x"]):
        refused(capsys, [*command, "--url", url], url)


def test_arrays_that_are_no_instances_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (np.float32(3), np.array([["a", "b"]]), np.zeros(4, np.float32)):
        np.savez(tmp_path / "x.npz", input=value)
        refused(capsys, ["convert", str(tmp_path / "x.npz"), str(tmp_path / "o.parquet")], "input", str(value.dtype))
    assert not (tmp_path / "o.parquet").exists()


def test_no_labels_means_that_the_column_is_not_read(stripes: Path, tmp_path: Path) -> None:
    """A label column of the wrong type, whose bytes are no Parquet page: reading it raises, leaving it alone works."""
    table = pq.read_table(stripes / "clean.parquet").slice(0, 320)
    target = tmp_path / "traffic.parquet"
    names = pa.array([f"not a class {row}" for row in range(len(table))])
    pq.write_table(table.set_column(1, "label", names), target, use_dictionary=False, compression="none")
    raw = bytearray(target.read_bytes())
    chunk = pq.ParquetFile(target).metadata.row_group(0).column(1)
    raw[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = (
        b"\xff" * chunk.total_compressed_size
    )
    target.write_bytes(raw)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(target)
    report = tmp_path / "report.json"
    files = ["--model", str(stripes / "model.yaml"), "--traffic", str(target), "--report", str(report)]
    for labels in ("none", "0"):
        assert run(["rehearse", *files, "--labels", labels, *QUICK]) == 0
        assert json.loads(report.read_text())["verdict"] == Verdict.NO_DRIFT
    assert run(["rehearse", *files, "--labels", "all", *QUICK]) == 2


def complete(report: dict[str, object], demo_too: bool = False) -> None:
    """Every key of contract 3.4, with its very name."""
    assert set(KEYS) <= set(report)
    for key, names in (("drift", ["kind", "alarm_after"]), ("seconds", SECONDS), ("adapter", ADAPTER)):
        assert set(names) == set(report[key])  # type: ignore[call-overload]
    accuracies = {"clean_before", "clean_after", "traffic_before", "traffic_after"}
    assert set(report["accuracy"]) == accuracies  # type: ignore[call-overload]
    if demo_too:
        assert set(report["requests"]) == {"sent", "failed", "mixed_generation"}  # type: ignore[call-overload]


def test_a_run_that_breaks_off_reports_an_error_with_every_key(
    stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "traffic").write_text("a file where the traffic's folder must be")
    report = tmp_path / "report.json"
    files = ["--model", str(stripes / "model.yaml"), "--traffic", str(stripes / "clean.parquet")]
    assert run(["rehearse", *files, "--storage", str(tmp_path / "records"), "--report", str(report)]) == 1
    found = json.loads(report.read_text())
    complete(found)
    assert found["verdict"] == "error"
    assert "traffic could not be written" in found["reason"]
    assert "next:" in capsys.readouterr().out
    broken = demo.failed_report("Ray did not start", demo.DemoOptions(storage=str(tmp_path)))
    complete(broken, demo_too=True)
    assert broken["verdict"] == "error"


def test_a_refusal_has_every_key_and_says_what_to_do_next(
    stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    files = ["--model", str(stripes / "model.yaml"), "--traffic", str(stripes / "drifted.parquet")]
    hold = ["--set", "without_labels=hold"]
    place = ["--storage", str(tmp_path / "records"), "--report", str(report)]
    assert run(["rehearse", *files, *place, *QUICK, *hold]) == 1
    found = json.loads(report.read_text())
    complete(found)
    assert found["verdict"] == "refused"
    said = capsys.readouterr().out
    assert "next: give labels" in said
    assert f"heal explain e0001 --storage {tmp_path / 'records'}" in said


def test_traffic_of_another_shape_or_type_is_named(
    stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "f.parquet", np.zeros((5, 16, 16, 3), np.float32))
    (tmp_path / "cut.parquet").write_bytes((stripes / "drifted.parquet").read_bytes()[:5000])
    files = ["rehearse", "--model", str(stripes / "model.yaml"), "--traffic"]
    refused(capsys, [*files, str(tmp_path / "f.parquet")], "uint8", "float32")
    refused(capsys, [*files, str(tmp_path / "cut.parquet")], "cut.parquet", "Parquet")
    refused(capsys, [*files, str(tmp_path)], str(tmp_path))
