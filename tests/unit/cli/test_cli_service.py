import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from orchestrator.cli import records, service
from orchestrator.cli.client import Client
from orchestrator.cli.main import run

REPLICA = {
    "replica": "heal#demo#abc123",
    "generation": 1,
    "digest": "d" * 64,
    "versions": ["base"],
    "age_s": 0.3,
    "live": True,
    "instances": 40,
    "errors": 0,
    "dropped": 0,
    "lost_reports": 0,
    "failure": "",
}
STATE: dict[str, Any] = {
    "service": "demo",
    "mode": "auto",
    "paused": False,
    "phase": "watching",
    "generation": 1,
    "stable": "d" * 64,
    "problem": "",
    "replicas": [REPLICA],
    "episode": None,
    "last_verdict": {"episode": "e0001", "verdict": "healed", "reason": "good", "closed_s": 5.0},
    "drift": {
        "alarm": None,
        "scopes": {"global": {"level": 0.2, "statistic": 3.0, "threshold": 1e6, "instances": 64}},
    },
}
TRIAL = {
    "trial_id": "e0001-0",
    "config": {"placement": "norm", "adapter_rank": 0, "learning_rate": 0.001},
    "score": 0.9,
    "reference_accuracy": "nan",
    "seconds": 2.0,
    "status": "finished",
}


class FakeService:
    """Answers like the `/healing` routes; `refusal` refuses every command."""

    def __init__(self) -> None:
        self.state = dict(STATE)
        self.refusal = ""
        self.posted: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/healing":
            return httpx.Response(200, json=self.state)
        if path == "/healing/episodes":
            return httpx.Response(200, json=[{"id": "e0001", "search": {"trials": [TRIAL]}}])
        if path == "/healing/events":
            body = {"command_id": "c1", "accepted": not self.refusal, "message": self.refusal}
            event = {"seq": 4, "event": "command", "body": body}
            return httpx.Response(200, text=f"retry: 1000\n\nid: 4\nevent: command\ndata: {json.dumps(event)}\n\n")
        self.posted.append((path, json.loads(request.content)))
        return httpx.Response(200, json={"command_id": "c1", "accepted": True})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    service_ = FakeService()

    def connect(url: str | None, name: str | None) -> Client:
        return Client("http://service", "token", httpx.Client(transport=httpx.MockTransport(service_)))

    for module in (service, records):
        monkeypatch.setattr(module, "connect", connect)
    return service_


def test_status_is_fine_while_nothing_is_wrong(fake: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status"]) == 0
    said = capsys.readouterr().out
    assert "generation 1" in said
    assert "e0001 healed" in said


def test_status_exits_1_when_there_is_a_problem(fake: FakeService) -> None:
    fake.state["problem"] = "StorageError: full"
    assert run(["status", "--json"]) == 1


def test_drift_exits_1_while_an_alarm_stands(fake: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["drift"]) == 0
    fake.state["drift"] = STATE["drift"] | {"alarm": {"scope": "global"}}
    assert run(["drift", "--json"]) == 1


def test_trials_are_listed_as_text_and_as_json(fake: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trials"]) == 0
    assert "e0001-0" in capsys.readouterr().out
    assert run(["trials", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [TRIAL]


@pytest.mark.parametrize("name", ["start", "approve", "pause", "resume", "promote", "abort", "rollback"])
def test_whatever_changes_things_needs_a_reason(fake: FakeService, name: str) -> None:
    assert run([name]) == 2
    assert run([name, "--reason", " "]) == 2
    assert fake.posted == []
    assert run([name, "--reason", "because"]) == 0
    assert fake.posted[0][0] == f"/healing/{name}"
    assert fake.posted[0][1]["reason"] == "because"


def test_a_refused_command_says_why_and_exits_1(fake: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refusal = "no open episode"
    assert run(["abort", "--reason", "because"]) == 1
    assert "refused: no open episode" in capsys.readouterr().out


def test_rollback_names_its_target_and_mode_its_mode(fake: FakeService) -> None:
    assert run(["rollback", "--to", "base", "--reason", "complaint"]) == 0
    assert run(["mode", "observe", "--reason", "audit"]) == 0
    assert fake.posted[0][1]["to"] == "base"
    assert fake.posted[1][1]["mode"] == "observe"
    assert run(["mode", "sometimes", "--reason", "audit"]) == 2


def test_a_dry_start_asks_for_nothing(fake: FakeService) -> None:
    assert run(["start", "--dry-run", "--reason", "look"]) == 0
    fake.state["episode"] = {"id": "e0002"}
    assert run(["start", "--dry-run", "--reason", "look"]) == 1
    assert fake.posted == []


def test_no_service_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--url", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "http://127.0.0.1:9" in said


def test_a_storage_without_records_is_named(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[Callable[[str], list[str]]] = [
        lambda uri: ["audit", "verify", "--storage", uri],
        lambda uri: ["adapters", "ls", "--storage", uri],
        lambda uri: ["history", "--storage", uri],
    ]
    for command in commands:
        assert run(command(str(tmp_path))) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["heel"]) == 2
    assert "heel" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    for name in ("demo", "rehearse", "status", "explain", "rollback", "audit", "adapters", "doctor", "convert", "down"):
        assert name in said
