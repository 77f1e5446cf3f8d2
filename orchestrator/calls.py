"""Which journal entries call a person, and in what words: CloudEvents, Slack, PagerDuty. Pure; used by `notifier`.

A message says what happened, why (the inequality), and what to do next. It never carries an input.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from orchestrator.errors import SpecError
from orchestrator.messages import Kind, Phase, Verdict

TYPE = "io.rayheal"
_HELP = {
    Verdict.REFUSED: "look at `heal explain {episode}`: it says what would help; serving goes on unchanged",
    Verdict.ABORTED: "what was being rolled out was taken back; `heal explain {episode}` says why",
    Verdict.ERROR: "something could not be measured; run `heal doctor`, then `heal start --reason ...`",
    Verdict.HEALED: "nothing; if it is provisional, label the instances that `heal status` lists",
}
_CAUSES = {
    Kind.OUTAGE: "restart what is down: see the replicas in `heal status`",
    Kind.REPLICA_FAULT: "restart that replica",
    Kind.SUSPICIOUS_SOURCE: "quarantine that source, or say that it is wanted",
    Kind.DATA_QUALITY: "mend the inputs at their source",
    Kind.CONCEPT: "label current traffic, then `heal start --reason ...`",
    Kind.UNKNOWN: "look at the inputs: nothing known explains them",
}


@dataclass(frozen=True)
class Call:
    """One message. `severity` is info, warning or critical."""

    id: str
    type: str
    time_s: float
    service: str
    summary: str
    reason: str
    todo: str
    severity: str
    data: dict[str, Any]


def call_for(service: str, seq: int, time_s: float, event: str, body: dict[str, Any]) -> Call | None:
    """The message of a journal entry; None where nobody needs to know."""
    episode = str(body.get("id" if event == "episode_closed" else "episode", ""))
    reason = str(body.get("message" if event in ("confirmed", "contradicted") else "reason", ""))
    found: tuple[str, str, str, str]  # type, summary, what to do, severity
    if event == "phase_entered" and body.get("phase") == Phase.AWAITING_APPROVAL.value:
        todo = f"look at `heal explain {episode}`, then `heal approve --reason ...` or `heal abort --reason ...`"
        found = "approval.requested", f"episode {episode} waits for approval", todo, "warning"
    elif event == "episode_closed" and body.get("verdict") in list(_HELP):
        verdict = Verdict(body["verdict"])
        diagnosis = body.get("diagnosis") or {}
        todo = _HELP[verdict].format(episode=episode)
        if verdict is Verdict.REFUSED and diagnosis.get("kind") in list(_CAUSES):
            todo = _CAUSES[Kind(diagnosis["kind"])]
        severity = {Verdict.HEALED: "info", Verdict.ERROR: "critical"}.get(verdict, "warning")
        found = f"episode.{verdict.value}", f"episode {episode} ended: {verdict.value}", todo, severity
    elif event == "reverted":
        summary = f"labels contradict {str(body.get('previous'))[:12]}: {str(body.get('digest'))[:12]} is served again"
        found = "adapter.reverted", summary, "look at `heal history`; the next alarm is searched for anew", "critical"
    elif event == "contradicted":
        summary = f"labels contradict {str(body.get('digest'))[:12]}"
        todo = "in observe mode: `heal rollback --reason ...`; else nothing, it is being taken back"
        found = "adapter.contradicted", summary, todo, "warning"
    elif event == "confirmed":
        found = "adapter.confirmed", f"labels confirm {str(body.get('digest'))[:12]}", "nothing", "info"
    else:
        return None
    kind, summary, todo, severity = found
    data: dict[str, Any] = {
        name: body[name] for name in ("digest", "previous", "generation", "verdict", "provisional") if name in body
    }
    data |= {"episode": episode} if episode else {}
    return Call(f"{service}/{seq}", f"{TYPE}.{kind}", time_s, service, summary, reason, todo, severity, data)


# ---------------------------------------------------------------- how each receiver wants it


def cloud_event(call: Call, _: str) -> dict[str, Any]:
    """CloudEvents 1.0, structured JSON."""
    return {
        "specversion": "1.0",
        "id": call.id,
        "source": f"/rayheal/{call.service}",
        "type": call.type,
        "time": datetime.fromtimestamp(call.time_s, UTC).isoformat(),
        "subject": call.data.get("episode", call.service),
        "datacontenttype": "application/json",
        "data": {
            "service": call.service,
            "summary": call.summary,
            "reason": call.reason,
            "what_to_do": call.todo,
            "severity": call.severity,
            **call.data,
        },
    }


def slack(call: Call, _: str) -> dict[str, Any]:
    """An incoming webhook's message."""
    text = f"*{call.service}: {call.summary}*\n{call.reason}\nWhat to do: {call.todo}"
    return {"text": html.escape(text, quote=False)}  # a source named <!channel> must not call everybody


def pagerduty(call: Call, query: str) -> dict[str, Any]:
    """Events API v2; the URL's `routing_key` goes into the body."""
    return {
        "routing_key": parse_qs(query)["routing_key"][0],
        "event_action": "trigger",
        "dedup_key": call.id,
        "payload": {
            "summary": f"{call.service}: {call.summary}",
            "source": call.service,
            "severity": call.severity,
            "timestamp": datetime.fromtimestamp(call.time_s, UTC).isoformat(),
            "custom_details": {"reason": call.reason, "what_to_do": call.todo, **call.data},
        },
    }


FORMATS: dict[str, Callable[[Call, str], dict[str, Any]]] = {
    "": cloud_event,
    "slack": slack,
    "pagerduty": pagerduty,
}


@dataclass(frozen=True)
class Receiver:
    """Where messages go, and how they look there."""

    url: str  # http or https, without the format
    format: str = ""
    query: str = ""

    @property
    def name(self) -> str:
        """A name without the URL's secrets."""
        secret = "\n".join((self.format, self.url, self.query))
        return f"{urlsplit(self.url).hostname}-{hashlib.sha256(secret.encode()).hexdigest()[:8]}"

    def body(self, call: Call) -> bytes:
        """What is sent."""
        return json.dumps(FORMATS[self.format](call, self.query), separators=(",", ":")).encode()


def parse_receivers(text: str) -> tuple[Receiver, ...]:
    """Receivers from a comma-separated setting: `https://...`, `slack+https://...`, `pagerduty+https://...`.

    Raises:
        SpecError: a URL is none, or its format is unknown; the message does not repeat it: it may hold a secret.
    """
    found = []
    for number, word in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        try:
            parts = urlsplit(word)
            usable = parts.username is None and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            parts, usable = urlsplit(""), False
        kind, _, scheme = parts.scheme.rpartition("+")
        printable = word.isascii() and word.isprintable() and " " not in word
        if not usable or not printable or scheme not in ("http", "https") or kind not in FORMATS:
            known = ", ".join(f"{name}+https://..." for name in FORMATS if name)
            raise SpecError(
                f"notify must hold URLs like https://... (no user, no spaces) or {known}; URL number {number} is none"
            )
        if kind == "pagerduty" and "routing_key" not in parse_qs(parts.query):
            raise SpecError(f"notify: the pagerduty URL must end in ?routing_key=...; URL number {number} does not")
        keeps = "" if kind == "pagerduty" else parts.query
        url = urlunsplit((scheme, parts.netloc, parts.path, keeps, ""))
        found.append(Receiver(url, kind, parts.query))
    return tuple(dict.fromkeys(found))


def sign(secret: str, message_id: str, sent_s: int, body: bytes) -> str:
    """Value of `webhook-signature` as the Standard Webhooks specification has it: v1, HMAC-SHA256, base64.

    Args:
        secret: `whsec_` and base64.
        message_id: value of `webhook-id`.
        sent_s: value of `webhook-timestamp`, seconds since the epoch.
        body: the bytes sent.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.digest(key, f"{message_id}.{sent_s}.".encode() + body, "sha256")
    return "v1," + base64.b64encode(mac).decode()
