import threading
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestrator.cli.client import Client, Reply
from orchestrator.cli.inputs import accuracy
from orchestrator.cli.load import Load, Sent, Stream
from orchestrator.cli.view import View, drift_level, is_tested, recent_accuracy, sparkline
from orchestrator.datasets import Dataset
from orchestrator.errors import ServiceError

DATA = Dataset(np.arange(10, dtype=np.uint8)[:, None], np.arange(10) % 3)


class Answers(Client):
    """Classifies instance i as i % 3, and fails on the value `broken`; `enough` is set after `wanted` requests."""

    def __init__(self, wanted: int, broken: int = -1) -> None:
        self.enough = threading.Event()
        self._wanted, self._broken, self._count = wanted, broken, 0

    def infer(self, model: str, inputs: np.ndarray, datatype: str, *_: Any, **__: Any) -> Reply:
        self._count += 1
        if self._count >= self._wanted:
            self.enough.set()
        if self._broken in inputs:
            raise ServiceError("request failed: 500: broken")
        return Reply(np.eye(3, dtype=np.float32)[inputs[:, 0] % 3], "base", 0, "token")


def send(client: Answers, rate: float = 2000.0) -> Load:
    load = Load(client, "m", "UINT8", Stream("clean", DATA), rate, 2)
    load.start()
    assert client.enough.wait(20)
    load.stop()
    return load


def test_every_row_is_sent_in_turn_and_every_answer_is_kept() -> None:
    load = send(Answers(20))
    rows = sorted(int(row) for sent in load.sent[:20] for row in sent.rows)
    assert len(load.sent) >= 20
    assert set(rows) == set(range(10))
    assert load.failed == 0
    assert recent_accuracy(load.sent) == 1.0


def test_a_failed_request_is_counted_and_told_and_not_sent_again() -> None:
    load = send(Answers(20, broken=3))
    failed = [sent for sent in load.sent if sent.error]
    assert load.failed == len(failed) > 0
    assert "500" in load.failures[0]
    assert load.stream.instances == 2 * len(load.sent)


def test_a_stream_is_switched_between_two_requests() -> None:
    client = Answers(10)
    load = Load(client, "m", "UINT8", Stream("clean", DATA), 2000.0, 2)
    drifted = Stream("drifted", DATA)
    assert drifted.first_s is None
    load.switch(drifted)
    load.start()
    assert client.enough.wait(20)
    load.stop()
    assert {sent.stream for sent in load.sent} == {"drifted"}
    assert drifted.first_s is not None


def test_accuracy_is_over_known_labels_only() -> None:
    assert accuracy(np.array([1, 2, 3]), np.array([1, -1, 0])) == 0.5
    assert accuracy(np.array([1]), np.array([-1])) is None
    assert accuracy(np.array([1]), None) is None


def test_a_sparkline_ends_full_at_an_alarm() -> None:
    assert sparkline([0.0, 0.5, 1.0, 7.0])[-2:] == "██"
    assert len(sparkline([0.1] * 500)) == 60


def test_drift_level_is_the_highest_scope_and_1_while_an_alarm_stands() -> None:
    scopes = {"global": {"level": 0.3}, "replica:a": {"level": 0.6}}
    assert drift_level({"drift": {"alarm": None, "scopes": scopes}}) == 0.6
    assert drift_level({"drift": {"alarm": {"scope": "global"}, "scopes": scopes}}) == 1.0
    assert drift_level({}) == 0.0


def test_silence_before_any_test_has_seen_traffic_is_not_called_no_alarm() -> None:
    scopes = {"global": {"level": 0.0, "statistic": 0.0, "threshold": 1e6, "instances": 32}}
    assert not is_tested({})
    assert not is_tested({"drift": {"alarm": None, "scopes": {}}})
    assert is_tested({"drift": {"alarm": None, "scopes": scopes}})
    assert is_tested({"drift": {"alarm": {"scope": "global"}, "scopes": {}}})


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_phase_and_replicas_on_any_output(terminal: bool) -> None:
    console = Console(force_terminal=terminal, width=120, record=True)
    replica = {"replica": "heal#x#abc", "generation": 2, "digest": "d" * 64, "instances": 8, "age_s": 0.1}
    state = {"phase": "canary", "generation": 1, "replicas": [replica], "drift": {"alarm": None, "scopes": {}}}
    sent = [Sent("drifted", np.arange(4), 1.0, 0.1, np.zeros((4, 3)), "base", 0, 3)]
    with View(console) as view:
        view.say("hello")
        view.update(state, sent, "drifted")
    shown = console.export_text()
    assert "canary" in shown
    assert "dddddddddddd" in shown
    assert "0.75" in shown
