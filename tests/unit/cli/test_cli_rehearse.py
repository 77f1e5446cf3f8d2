import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from orchestrator.cli.main import run
from orchestrator.datasets import write_dataset
from orchestrator.journal import verify_journal
from orchestrator.storage import open_storage

QUICK = ["--set", "num_trials=2", "--set", "trial_epochs=1", "--set", "bake_s=1"]


def rehearse(folder: Path, traffic: Path, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    report = tmp_path / "report.json"
    files = ["--model", str(folder / "model.yaml"), "--traffic", str(traffic), "--report", str(report)]
    code = run(["rehearse", *files, *QUICK, *more])
    return code, json.loads(report.read_text()) if report.exists() else {}


def unlabelled(source: Path, target: Path) -> Path:
    """The same instances in a file that has no label column at all."""
    pq.write_table(pq.read_table(source).select(["input"]), target)
    return target


@pytest.fixture(scope="module")
def healed(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A rehearsal of drifted traffic without a label column: its storage and its report."""
    folder = tmp_path_factory.mktemp("healed")
    traffic, storage = unlabelled(stripes / "drifted.parquet", folder / "bare.parquet"), str(folder / "records")
    measured = ["--eval", str(stripes / "eval.parquet"), "--labels", "none", "--storage", storage]
    code, report = rehearse(stripes, traffic, folder, *measured)
    assert (code, report["verdict"]) == (0, "healed"), report["reason"]
    return storage, report


def test_recorded_drift_heals_without_a_label_column(healed: tuple[str, dict[str, Any]]) -> None:
    storage, report = healed
    assert report["accuracy"]["traffic_after"] > report["accuracy"]["traffic_before"] + 0.1
    assert report["recovered"] > 0.3
    assert 0 < report["drift"]["alarm_after"] <= 960
    assert report["trials"]
    assert verify_journal(open_storage(storage)).problems == []


def test_a_recorded_episode_can_be_read_back_and_explained(
    healed: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    storage, report = healed
    assert run(["history", "--storage", storage, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["winner"] == report["adapter"]["digest"]
    assert run(["explain", found[0]["id"], "--storage", storage]) == 0
    story = capsys.readouterr().out
    assert "diagnosis: covariate_harmful" in story
    assert "gate:" in story
    assert run(["audit", "verify", "--storage", storage]) == 0
    assert run(["adapters", "verify", "--storage", storage]) == 0
    assert run(["adapters", "ls", "--storage", storage]) == 0
    assert run(["adapters", "show", found[0]["winner"][:10], "--storage", storage]) == 0


def test_clean_traffic_raises_no_alarm(stripes: Path, tmp_path: Path) -> None:
    code, report = rehearse(stripes, stripes / "clean.parquet", tmp_path)
    assert (code, report["verdict"], report["drift"]["alarm_after"]) == (0, "no_drift", None)
    assert report["accuracy"]["clean_before"] == report["accuracy"]["clean_after"]
    assert report["accuracy"]["traffic_before"] is None


def test_two_rehearsals_of_one_file_decide_alike(
    stripes: Path, healed: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    again = rehearse(stripes, stripes / "drifted.parquet", tmp_path, "--eval", str(stripes / "eval.parquet"))[1]
    for report in (first := json.loads(json.dumps(healed[1])), again):
        del report["seconds"]
        for trial in report["trials"]:
            del trial["seconds"]
    assert first == again


def test_labels_that_are_told_reach_the_search(stripes: Path, tmp_path: Path) -> None:
    _, report = rehearse(stripes, stripes / "drifted.parquet", tmp_path, "--labels", "all")
    assert any(trial["labelled_accuracy"] is not None for trial in report["trials"])


def test_traffic_that_ends_too_soon_is_refused_with_the_numbers(stripes: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "short.parquet", *tiny.make(160, seed=12, drift=True))
    code, report = rehearse(stripes, tmp_path / "short.parquet", tmp_path)
    assert code == (0 if report["verdict"] == "no_drift" else 1)
    assert report["verdict"] in ("refused", "no_drift")


def bad_files(stripes: Path, tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    model, drifted = stripes / "model.yaml", stripes / "drifted.parquet"
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "empty.yaml").write_text("")
    write_dataset(tmp_path / "shape.parquet", np.zeros((3, 8, 8, 3), np.uint8))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "column.parquet")
    return {
        "absent traffic": (model, tmp_path / "absent.parquet"),
        "no Parquet": (model, tmp_path / "text.parquet"),
        "wrong shape": (model, tmp_path / "shape.parquet"),
        "wrong column": (model, tmp_path / "column.parquet"),
        "absent model": (tmp_path / "absent.yaml", drifted),
        "empty model": (tmp_path / "empty.yaml", drifted),
    }


def test_bad_files_end_in_one_line_and_exit_code_2(
    stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (model, traffic) in bad_files(stripes, tmp_path).items():
        code = run(["rehearse", "--model", str(model), "--traffic", str(traffic)])
        said = capsys.readouterr().err.strip()
        assert code == 2, name
        assert said.startswith("heal: "), name
        assert "\n" not in said, name


def test_a_rehearsal_never_writes_into_a_services_journal(stripes: Path, tmp_path: Path) -> None:
    storage = str(tmp_path / "records")
    rehearse(stripes, stripes / "clean.parquet", tmp_path, "--storage", storage)
    code, _ = rehearse(stripes, stripes / "clean.parquet", tmp_path, "--storage", storage)
    assert code == 2
