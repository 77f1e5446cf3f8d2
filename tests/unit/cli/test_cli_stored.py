"""What `--storage` reads of a service that does not run, from the records of a real rehearsal."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run
from orchestrator.storage import open_storage

QUICK = ["--set", "num_trials=2", "--set", "trial_epochs=1", "--set", "bake_s=1"]


@pytest.fixture(scope="module")
def records(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("stored")
    files = ["--model", str(stripes / "model.yaml"), "--traffic", str(stripes / "drifted.parquet")]
    place = ["--storage", str(folder / "records"), "--report", str(folder / "report.json")]
    assert run(["rehearse", *files, *place, *QUICK]) == 0
    return str(folder / "records")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_status_drift_and_trials_are_read_from_the_records(records: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, state = told(capsys, "status", "--storage", records)
    assert (code, state["phase"], state["generation"]) == (0, "watching", 1)
    assert run(["status", "--storage", records]) == 0
    assert "as recorded at" in capsys.readouterr().out
    assert set(told(capsys, "drift", "--storage", records)[1]) >= {"alarm", "scopes"}
    code, trials = told(capsys, "trials", "--storage", records)
    assert (code, len(trials)) == (0, 2)
    assert told(capsys, "trials", "e0001", "--storage", records)[1] == trials
    assert run(["trials", "e0099", "--storage", records]) == 2
    assert "e0001" in capsys.readouterr().err


def test_evidence_names_figures_limits_adapter_and_journal_entries(
    records: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = told(capsys, "evidence", "e0001", "--storage", records)
    assert (code, found["problems"], found["verdict"]) == (0, [], "healed")
    assert all(set(row) == {"check", "value", "limit", "passed"} for row in found["gate"]["checks"])
    assert found["gate"]["checks"]
    assert found["adapter"]["manifest"]["digest"] == found["adapter"]["digest"]
    assert {entry["event"] for entry in found["journal"]} >= {"episode_closed"}
    assert run(["evidence", "e0001", "--storage", records]) == 0
    assert "alarm:" in capsys.readouterr().out
    assert run(["evidence", "e0007", "--storage", records]) == 2


def test_evidence_that_was_changed_fails(records: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(records)
    found = told(capsys, "evidence", "e0001", "--storage", records)[1]
    key = f"adapters/{found['adapter']['digest']}/adapter_model.safetensors"
    whole = storage.get(key)
    try:
        storage.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
        code, changed = told(capsys, "evidence", "e0001", "--storage", records)
    finally:
        storage.put(key, whole)
    assert code == 1
    assert changed["problems"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["drift"], ["trials"], ["history"], ["explain", "e1"], ["audit", "verify"]):
        assert run([*command, "--storage", str(tmp_path / "typo")]) == 2
        assert "typo" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
