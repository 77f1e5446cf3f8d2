"""What calls a person: which entries, in what words, signed, and never lost."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import Desk

from orchestrator.calls import Receiver, call_for, parse_receivers, sign
from orchestrator.cli.main import run
from orchestrator.errors import SpecError
from orchestrator.keys import load_keys
from orchestrator.notifier import Notifier
from orchestrator.storage import open_storage

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
CLOSED = {"id": "e0001", "verdict": "refused", "reason": "p 0.2 > 0.05", "diagnosis": {"kind": "data_quality"}}


def entry(seq: int, event: str, **body: Any) -> dict[str, Any]:
    return {"seq": seq, "time_s": 1000.0 + seq, "event": event, "body": body}


BAD = ["https://u:s3cret@x/", "https://x:port/", "https://x/a b", "https://[bad/", "https://x/\u00e9"]


def journal(entries: list[dict[str, Any]]) -> Callable[[int], list[dict[str, Any]]]:
    """Entries with a higher number, of a list that may grow."""
    return lambda after: [e for e in entries if e["seq"] > after]


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def test_a_refusal_says_why_and_what_to_do() -> None:
    call = call_for("digits", 7, 1000.0, "episode_closed", CLOSED)
    assert call is not None
    assert (call.id, call.type, call.severity) == ("digits/7", "io.rayheal.episode.refused", "warning")
    assert (call.reason, call.todo) == ("p 0.2 > 0.05", "mend the inputs at their source")
    sent = json.loads(Receiver("http://x").body(call))
    assert (sent["specversion"], sent["source"], sent["subject"]) == ("1.0", "/rayheal/digits", "e0001")
    assert sent["data"]["what_to_do"] == "mend the inputs at their source"


@pytest.mark.parametrize(
    ("event", "body", "kind"),
    [
        ("phase_entered", {"episode": "e1", "phase": "awaiting_approval"}, "approval.requested"),
        ("phase_entered", {"episode": "e1", "phase": "canary"}, None),
        ("episode_closed", CLOSED | {"verdict": "healed"}, "episode.healed"),
        ("episode_closed", CLOSED | {"verdict": "aborted"}, "episode.aborted"),
        ("episode_closed", CLOSED | {"verdict": "error"}, "episode.error"),
        ("episode_closed", CLOSED | {"verdict": "no_drift"}, None),
        ("reverted", {"digest": "base", "previous": "d1", "reason": "labels"}, "adapter.reverted"),
        ("confirmed", {"digest": "d1", "message": "9 wins"}, "adapter.confirmed"),
        ("state", {}, None),
    ],
)
def test_what_people_need_to_know_is_said_and_nothing_else(event: str, body: dict[str, Any], kind: str | None) -> None:
    call = call_for("digits", 1, 1000.0, event, body)
    assert (call.type if call else None) == (f"io.rayheal.{kind}" if kind else None)
    assert call is None or call.todo


def test_slack_and_pagerduty_get_messages_of_their_own() -> None:
    call = call_for("digits", 7, 1000.0, "episode_closed", CLOSED)
    assert call is not None
    slack, pager = parse_receivers(
        "slack+https://hooks.test/T/B, pagerduty+https://events.test/v2/enqueue?routing_key=R1"
    )
    assert "mend the inputs" in json.loads(slack.body(call))["text"]
    sent = json.loads(pager.body(call))
    assert (pager.url, sent["routing_key"], sent["dedup_key"]) == ("https://events.test/v2/enqueue", "R1", "digits/7")
    assert sent["payload"]["severity"] == "warning"


@pytest.mark.parametrize(
    "text", ["ftp://x", "teams+https://x", "https:///p", "pagerduty+https://x/y", "https://a, b", *BAD]
)
def test_a_url_that_is_none_is_refused_without_repeating_its_secret(text: str) -> None:
    with pytest.raises(SpecError, match="notify") as caught:
        parse_receivers(text)
    assert text not in str(caught.value)


def test_the_signature_is_what_the_standard_webhooks_libraries_check() -> None:
    body = b'{"a":1}'
    expected = hmac.new(b"k" * 32, b"digits/7.1700000000." + body, hashlib.sha256).digest()
    assert sign(SECRET, "digits/7", 1700000000, body) == "v1," + base64.b64encode(expected).decode()


def test_messages_are_signed_in_order_and_each_is_delivered_once(desk: Desk, tmp_path: Path) -> None:
    entries = [entry(0, "started")]
    storage, receiver = open_storage(tmp_path), Receiver(desk.url)
    notifier = Notifier("digits", receiver, SECRET, storage, journal(entries))
    while not storage.list("notify/"):
        threading.Event().wait(0.01)  # the cursor is set: what comes from here on is sent
    entries += [entry(1, "episode_closed", **CLOSED), entry(2, "state")]
    entries += [entry(3, "confirmed", digest="d1", message="m")]
    notifier.wake()
    desk.wait(lambda: len(desk.taken) == 2)
    notifier.close()
    for headers, body in desk.taken:
        stamp = int(headers["webhook-timestamp"])
        assert headers["webhook-signature"] == sign(SECRET, headers["webhook-id"], stamp, body)
        assert headers["content-type"] == "application/cloudevents+json"
    again = Notifier("digits", receiver, SECRET, storage, journal(entries))
    entries.append(entry(4, "reverted", digest="base", previous="d1", reason="labels"))
    again.wake()
    desk.wait(lambda: len(desk.taken) == 3)
    again.close()
    assert [headers["webhook-id"] for headers, _ in desk.taken] == ["digits/1", "digits/3", "digits/4"]


def test_a_receiver_that_is_down_for_a_while_loses_nothing(desk: Desk, tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = []
    storage = open_storage(tmp_path)
    storage.put(f"notify/{Receiver(desk.url).name}.json", b'{"after": -1}')
    desk.status = 503
    notifier = Notifier("digits", Receiver(desk.url), SECRET, storage, journal(entries), pause_s=0.01)
    entries += [entry(n, "episode_closed", **CLOSED) for n in range(5)]
    notifier.wake()
    desk.wait(lambda: desk.asked >= 3)
    assert "503" in notifier.problem
    notifier.close()  # the orchestrator dies while messages wait
    desk.status = 204
    after = Notifier("digits", Receiver(desk.url), SECRET, storage, journal(entries), pause_s=0.01)
    desk.wait(lambda: len(desk.taken) == 5)
    after.close()
    assert [headers["webhook-id"] for headers, _ in desk.taken] == [f"digits/{n}" for n in range(5)]


@pytest.mark.parametrize("status", [0, 301, 308, 503])
def test_an_answer_that_is_none_a_redirect_or_an_error_keeps_the_message(
    desk: Desk, tmp_path: Path, status: int
) -> None:
    storage = open_storage(tmp_path)
    storage.put(f"notify/{Receiver(desk.url).name}.json", b'{"after": -1}')
    desk.status = status
    notifier = Notifier(
        "digits",
        Receiver(desk.url),
        SECRET,
        storage,
        journal([entry(0, "episode_closed", **CLOSED)]),
        pause_s=0.01,
    )
    desk.wait(lambda: desk.asked >= 2)
    assert notifier.trouble
    desk.status = 204
    desk.wait(lambda: len(desk.taken) == 1)
    notifier.close()


def test_a_broken_cursor_is_said_and_ends_nothing(desk: Desk, tmp_path: Path) -> None:
    storage, key = open_storage(tmp_path), f"notify/{Receiver(desk.url).name}.json"
    storage.put(key, b"")
    entries = [entry(0, "episode_closed", **CLOSED)]
    notifier = Notifier("digits", Receiver(desk.url), SECRET, storage, journal(entries), pause_s=0.01)
    for _ in range(1000):
        if notifier.trouble:
            break
        threading.Event().wait(0.01)
    assert notifier.trouble == "JSONDecodeError"
    storage.put(key, b'{"after": -1}')
    desk.wait(lambda: len(desk.taken) == 1)
    notifier.close()


def test_receivers_that_differ_in_their_key_alone_have_cursors_of_their_own() -> None:
    url = "pagerduty+https://e.test/v2?routing_key="
    first, second = parse_receivers(f"{url}A, {url}B, {url}A")
    assert first.name != second.name


def test_a_message_that_is_never_taken_does_not_hold_up_the_next(desk: Desk, tmp_path: Path, caplog: Any) -> None:
    entries = [entry(0, "episode_closed", **CLOSED)]
    storage = open_storage(tmp_path)
    storage.put(f"notify/{Receiver(desk.url).name}.json", b'{"after": -1}')
    desk.status = 410
    notifier = Notifier("digits", Receiver(desk.url), SECRET, storage, journal(entries), pause_s=0.01)
    desk.wait(lambda: desk.asked == 1)
    desk.status = 204
    entries.append(entry(1, "reverted", digest="base", previous="d1", reason="labels"))
    notifier.wake()
    desk.wait(lambda: len(desk.taken) == 1)
    notifier.close()
    assert "will never take message digits/0" in caplog.text
    assert notifier.trouble == "1 messages refused and dropped"


def test_the_command_tries_each_receiver(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEAL_HOME", str(tmp_path))
    secret = load_keys("digits").webhook_secret
    assert run(["notify", desk.url, "--service", "digits", "--show-secret"]) == 0
    assert secret in capsys.readouterr().out
    headers, body = desk.taken[0]
    assert headers["webhook-signature"] == sign(secret, headers["webhook-id"], int(headers["webhook-timestamp"]), body)
    desk.status = 500
    assert run(["notify", desk.url, "--service", "digits"]) == 1
    assert "500" in capsys.readouterr().out
    assert run(["notify", "nonsense", "--service", "digits"]) == 2
