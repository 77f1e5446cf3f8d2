"""The report of `heal demo` and `heal rehearse` (contract 3.4): built from an episode's record, every key always there.

Pure: dictionaries in, a dictionary out. `write_report` and `summary_table` are the only edges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import StorageError
from orchestrator.messages import Phase, Verdict
from orchestrator.settings import SCHEMA_VERSION

LEAST_LOSS = 0.01  # accuracy: below this there is nothing to recover
ACCURACIES = ("clean_before", "clean_after", "traffic_before", "traffic_after")
SECONDS = ("detect", "cold_start", "search", "train", "gate", "canary", "rollout", "total")


def build_report(
    episode: Mapping[str, Any] | None,
    *,
    accuracy: Mapping[str, float | None],
    alarm_after: int | None,
    onset_s: float | None,
    seeds: Mapping[str, Any],
    fallback: tuple[Verdict, str] = (Verdict.NO_DRIFT, "no alarm was raised"),
    requests: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The report.

    Args:
        episode: record of the episode, as `/healing/episodes/{id}` answers; None: there was none.
        accuracy: any of ACCURACIES, 0..1; what was not measured is None or left out.
        alarm_after: instances from the first drifted one (demo) or from the file's start (rehearse) to the alarm.
        onset_s: when the first of those was sent, on the record's clock.
        seeds: every seed that a repetition needs.
        fallback: verdict and reason where there is no episode, or none that ended.
        requests: the demo's counts.
    """
    record = episode or {}
    measured = {name: _number(accuracy.get(name)) for name in ACCURACIES}
    verdict = record.get("verdict") or fallback[0].value
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict,
        "reason": record.get("reason") or fallback[1],
        "provisional": bool(record.get("provisional", False)),
        "drift": {"kind": (record.get("diagnosis") or {}).get("kind", "none"), "alarm_after": alarm_after},
        "accuracy": measured,
        "recovered": recovered(measured),
        "seconds": seconds(record, onset_s),
        "adapter": _adapter(record),
        "trials": [_trial(trial) for trial in (record.get("search") or {}).get("trials", [])],
        "seeds": {"episode": record.get("seed"), **seeds},
    }
    if requests is not None:
        report["requests"] = {name: int(requests.get(name, 0)) for name in ("sent", "failed", "mixed_generation")}
    return report


def recovered(accuracy: Mapping[str, float | None]) -> float | None:
    """Share of the lost accuracy that came back; None when less than one point was lost, or it was not measured."""
    before, after, clean = (accuracy[n] for n in ("traffic_before", "traffic_after", "clean_before"))
    if before is None or after is None or clean is None or clean - before < LEAST_LOSS:
        return None
    return round((after - before) / (clean - before), 4)


def seconds(record: Mapping[str, Any], onset_s: float | None) -> dict[str, float | None]:
    """Where the time went. `total`: from the first drifted instance to the last replica's ack, or to the verdict."""
    found: dict[str, float | None] = dict.fromkeys(SECONDS)
    entered = record.get("phase_entered") or {}
    search = record.get("search") or {}
    alarm = record.get("alarm") or {}
    closed_s = _number(record.get("closed_s"))

    def between(first: str, *following: str) -> float | None:
        if first not in entered:
            return None
        ends = [_number(entered.get(name)) for name in following] + [closed_s]
        end = next((value for value in ends if value is not None), None)
        return None if end is None else end - float(entered[first])

    raised_s = _number(alarm.get("raised_s"))
    found["detect"] = None if onset_s is None or raised_s is None else raised_s - onset_s
    found["cold_start"] = _number(search.get("cold_start_s"))
    found["search"] = _number(search.get("search_s")) or between(Phase.SEARCHING, Phase.GATING)
    found["train"] = _number(search.get("train_s"))
    found["gate"] = between(Phase.GATING, Phase.AWAITING_APPROVAL, Phase.CANARY)
    found["canary"] = between(Phase.CANARY, Phase.ROLLING)
    found["rollout"] = between(Phase.ROLLING, Phase.BAKING)
    done_s = _number(entered.get(Phase.BAKING)) or closed_s
    found["total"] = None if onset_s is None or done_s is None else done_s - onset_s
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def _adapter(record: Mapping[str, Any]) -> dict[str, Any]:
    trial = record.get("winner_trial") or {}
    config = trial.get("config") or {}
    winner = record.get("winner")
    return {
        "digest": winner,
        "adapter_rank": config.get("adapter_rank"),
        "placement": config.get("placement"),
        "learning_rate": config.get("learning_rate"),
        "objective": trial.get("objective"),
        "parameters": trial.get("parameters"),
    }


def _trial(trial: Mapping[str, Any]) -> dict[str, Any]:
    """One trial, flat, as JSON: NaN (not measured) becomes null."""
    flat = {**(trial.get("config") or {}), **{key: value for key, value in trial.items() if key != "config"}}
    return {key: None if value in ("nan", "inf", "-inf") else _finite(value) for key, value in flat.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    """A finite float, or None: records spell NaN as text."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(value)


def check_report_path(path: Path) -> None:
    """Whether a report can be written there: asked before the minutes of work that it tells about.

    Raises:
        StorageError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not path.stat().st_size:
            path.unlink()
    except OSError as error:
        raise StorageError(f"the report must be writable at {path}: {error}; choose another --report") from error


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as JSON.

    Raises:
        StorageError: the path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the report must be writable at {path}: {error}; choose another --report") from error


def summary_table(report: Mapping[str, Any]) -> Table:
    """The report for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    accuracy, took, adapter = report["accuracy"], report["seconds"], report["adapter"]
    provisional = " (provisional: until labels confirm it)" if report["provisional"] else ""
    table.add_row("verdict", f"[bold]{report['verdict']}[/bold]{provisional}")
    table.add_row("reason", str(report["reason"]))
    after = report["drift"]["alarm_after"]
    alarm = "no alarm" if after is None else f"alarm after {after} instances"
    table.add_row("drift", f"{report['drift']['kind']}, {alarm}")
    table.add_row("accuracy", f"clean {_share(accuracy['clean_before'])} -> {_share(accuracy['clean_after'])}")
    table.add_row("", f"traffic {_share(accuracy['traffic_before'])} -> {_share(accuracy['traffic_after'])}")
    table.add_row("recovered", _share(report["recovered"]))
    if adapter["digest"]:
        table.add_row("adapter", f"{adapter['digest'][:12]} {adapter['placement']} rank {adapter['adapter_rank']}")
    table.add_row("seconds", ", ".join(f"{name} {took[name]:.1f}" for name in SECONDS if took[name] is not None))
    table.add_row("trials", str(len(report["trials"])))
    if "requests" in report:
        table.add_row("requests", ", ".join(f"{name} {value}" for name, value in report["requests"].items()))
    return table


_NEXT = {
    Verdict.NO_DRIFT: ("the traffic looks like the reference: nothing to heal",),
    Verdict.NO_ACTION: ("the drift costs less than harm_threshold: nothing to heal; lower it with --set",),
    Verdict.REFUSED: (
        "no adapter was released: the reason says which limit it broke, or why none was tried",
        "give labels (--labels 100, or all) to let it prove itself on them, or retrain the model on this traffic",
    ),
    Verdict.ABORTED: (
        "the candidate was taken back during its rollout: the service answers as before",
        "run it again with more traffic, or see which guard stopped it",
    ),
    Verdict.AWAITING_APPROVAL: ("release it with `heal approve --reason WHY`, or end it: `heal abort --reason WHY`",),
    Verdict.ERROR: ("nothing was decided, as it could not be measured: mend what the reason names and run it again",),
}


def next_steps(report: Mapping[str, Any], storage: str | None) -> list[str]:
    """What to do now, in lines; nothing where it healed.

    Args:
        report: as `build_report` makes it.
        storage: where its records are kept; None: nowhere.
    """
    advice = [f"next: {line}" for line in _NEXT.get(Verdict(report["verdict"]), ())]
    if advice and report["drift"]["alarm_after"] is not None:
        where = f"heal explain e0001 --storage {storage}" if storage else "run it again with --storage FOLDER"
        advice.append(f"next: every figure behind it: {where}")
    return advice


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
