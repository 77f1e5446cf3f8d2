import json
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.report import build_report, recovered, seconds, summary_table, write_report
from orchestrator.errors import StorageError
from orchestrator.messages import Diagnosis, Kind, Placement, SearchStatus, TrialConfig, TrialResult, Verdict
from orchestrator.state import Episode

KEYS = {
    "schema_version",
    "verdict",
    "reason",
    "provisional",
    "drift",
    "accuracy",
    "recovered",
    "seconds",
    "adapter",
    "trials",
    "seeds",
}
ACCURACY = {"clean_before": 0.98, "clean_after": 0.9, "traffic_before": 0.5, "traffic_after": 0.86}


def healed() -> dict[str, Any]:
    trial = TrialResult("e0001-1", TrialConfig(Placement.EARLY, 8, 1e-3, 0.5, 2, 1), "finished", 0.9, "infomax", 2)
    return Episode(
        id="e0001",
        opened_s=101.0,
        diagnosis=Diagnosis(Kind.COVARIATE_HARMFUL, "it hurts", 256),
        phase_entered={
            "diagnosing": 101,
            "searching": 105,
            "gating": 125,
            "canary": 130,
            "rolling": 134,
            "baking": 136,
        },
        search=SearchStatus("finished", (trial,), "d" * 64, "e0001-1", cold_start_s=6.0, search_s=19.5, train_s=12.0),
        winner="d" * 64,
        winner_trial=trial,
        verdict=Verdict.HEALED,
        reason="good",
        provisional=True,
        closed_s=141.0,
        seed=7,
    ).to_dict()


def test_every_key_of_the_contract_is_there_without_an_episode() -> None:
    report = build_report(None, accuracy={}, alarm_after=None, onset_s=None, seeds={})
    assert set(report) == KEYS
    assert report["verdict"] == "no_drift"
    assert set(report["accuracy"]) == {"clean_before", "clean_after", "traffic_before", "traffic_after"}
    assert set(report["seconds"]) >= {"detect", "cold_start", "search", "train", "gate", "canary", "rollout", "total"}
    assert set(report["adapter"]) >= {"digest", "adapter_rank", "placement", "learning_rate", "objective", "parameters"}


def test_demo_reports_its_requests_and_rehearsal_does_not() -> None:
    counts = {"sent": 3, "failed": 1, "mixed_generation": 0}
    report = build_report(None, accuracy={}, alarm_after=None, onset_s=None, seeds={}, requests=counts)
    assert report["requests"] == counts
    assert "requests" not in build_report(None, accuracy={}, alarm_after=None, onset_s=None, seeds={})


def test_a_healed_episode_is_told_with_its_times_trials_and_adapter() -> None:
    report = build_report(healed(), accuracy=ACCURACY, alarm_after=64, onset_s=100.0, seeds={"service": 0})
    assert (report["verdict"], report["provisional"]) == ("healed", True)
    assert report["drift"] == {"kind": "covariate_harmful", "alarm_after": 64}
    assert report["recovered"] == pytest.approx(0.75)
    took = report["seconds"]
    assert (took["gate"], took["canary"], took["rollout"], took["total"]) == (5.0, 4.0, 2.0, 36.0)
    assert (took["cold_start"], took["search"], took["train"]) == (6.0, 19.5, 12.0)
    assert report["adapter"]["placement"] == "early"
    assert report["trials"][0]["adapter_rank"] == 8
    assert report["seeds"] == {"episode": 7, "service": 0}


def test_values_that_were_not_measured_become_null_in_json(tmp_path: Path) -> None:
    report = build_report(healed(), accuracy=ACCURACY, alarm_after=64, onset_s=None, seeds={})
    write_report(report, tmp_path / "deep" / "report.json")
    read = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert read["trials"][0]["labelled_accuracy"] is None
    assert read["seconds"]["detect"] is None


@pytest.mark.parametrize("lost", [0.0, 0.005, -0.2])
def test_recovered_is_null_when_less_than_a_point_was_lost(lost: float) -> None:
    assert recovered({"clean_before": 0.9, "traffic_before": 0.9 - lost, "traffic_after": 0.9}) is None


def test_recovered_is_null_when_it_was_not_measured() -> None:
    assert recovered({"clean_before": 0.9, "traffic_before": None, "traffic_after": None}) is None


def test_a_refused_episode_ends_its_last_phase_at_its_verdict() -> None:
    record = healed() | {"phase_entered": {"diagnosing": 101.0, "searching": 105.0, "gating": 125.0}, "closed_s": 128.0}
    took = seconds(record, 100.0)
    assert (took["gate"], took["canary"], took["rollout"], took["total"]) == (3.0, None, None, 28.0)


def test_report_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--report"):
        write_report({}, tmp_path / "file" / "report.json")


def test_summary_names_the_verdict_for_people() -> None:
    report = build_report(healed(), accuracy=ACCURACY, alarm_after=64, onset_s=100.0, seeds={})
    cells = [cell for column in summary_table(report).columns for cell in column.cells]
    assert any("healed" in str(cell) and "provisional" in str(cell) for cell in cells)
    assert math.isclose(report["accuracy"]["clean_before"], 0.98)
