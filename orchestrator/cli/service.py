"""Commands about a running service: how it stands, and what a person asks of it. They go through HTTP.

`history` and `explain` read a storage instead when one is named: see `records`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.cli.client import Client, connect, short
from orchestrator.cli.console import (
    FINE,
    NOT_FINE,
    Json,
    Reason,
    Service,
    StorageUri,
    Url,
    finish,
    given,
    out,
    show_json,
)
from orchestrator.cli.records import episodes, named, when
from orchestrator.cli.stored import stored_state
from orchestrator.cli.view import NOT_TESTED, drift_level, is_tested
from orchestrator.errors import ServiceError
from orchestrator.messages import Mode

ANSWER_S = 10.0  # a command is handled by the next pass; a loaded orchestrator may take a few seconds
WATCH_S = 1.0

To = Annotated[str, typer.Option("--to", help="Digest or base [default: what was served before].")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, drift, trials, start, mode, rollback, services, down):
        app.command()(command)
    for name, text in _PLAIN.items():
        app.command(name, help=text)(_plain(name))


_PLAIN = {
    "approve": "Release what awaits approval.",
    "pause": "Let nothing be decided until `resume`; serving goes on.",
    "resume": "Go on after `pause`.",
    "promote": "Roll the canary's adapter out now.",
    "abort": "End the open episode and take back what it brought.",
}


def _state(url: str | None, service: str | None, storage: str | None = None) -> dict[str, Any]:
    if storage is not None:
        return stored_state(storage)
    client = connect(url, service)
    try:
        return client.state()
    finally:
        client.close()


def status(
    url: Url = None,
    service: Service = None,
    storage: StorageUri = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until interrupted.")] = False,
    as_json: Json = False,
) -> None:
    """Phase, generation, replicas, last verdict. Exit code 1 when there is a problem.

    With --storage: as the last journal entry has it. With --watch --json: a line of JSON each second.
    """
    if watch:
        return _watch(url, service, storage, as_json)
    state = _state(url, service, storage)
    if as_json:
        show_json(state)
    else:
        out.print(_status(state))
    troubled = state.get("problem") or any(row["failure"] for row in state["replicas"])
    return finish(NOT_FINE if troubled else FINE)


def _watch(url: str | None, service: str | None, storage: str | None, as_json: bool) -> None:
    """Show the state each second until Ctrl-C; a service that is away is shown as such."""
    client = None if storage is not None else connect(url, service)
    pause = threading.Event()  # never set: Ctrl-C ends the wait
    try:
        with nullcontext() if as_json else Live(console=out, refresh_per_second=2, transient=False) as live:
            while True:
                try:
                    state = stored_state(storage) if storage is not None else client.state()  # type: ignore[union-attr]
                except ServiceError as error:
                    shown: Any = {"problem": str(error)} if live is None else Text(str(error), style="red")
                else:
                    shown = state if live is None else _status(state)
                if live is None:
                    typer.echo(json.dumps(shown, default=str))
                else:
                    live.update(shown)
                pause.wait(WATCH_S)
    except KeyboardInterrupt:
        return
    finally:
        if client is not None:
            client.close()


def _status(state: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    paused = " (paused)" if state.get("paused") else ""
    named = state["service"] or f"as recorded at {when(state['time_s'])}:"
    table.add_row("service", f"{named}  mode {state['mode']}{paused}")
    table.add_row("phase", str(state["phase"]))
    table.add_row("serves", f"generation {state['generation']}: {short(state['stable'])}")
    table.add_row("drift", f"{drift_level(state):.2f} (an alarm at 1)" if is_tested(state) else NOT_TESTED)
    for row in state["replicas"]:
        alive = f"{row['age_s']:.1f} s ago" if row["live"] else "LOST"
        serves = f"generation {row['generation']} {short(row['digest'])}, {row['instances']} instances, {alive}"
        table.add_row(str(row["replica"])[-16:], f"{serves}  {row['failure']}".rstrip())
    if last := state.get("last_verdict"):
        table.add_row("last verdict", f"{last['episode']} {last['verdict']}: {last['reason']}")
    if comparison := state.get("comparison"):
        table.add_row("labels say", f"{comparison['outcome']}: {comparison['message']}")
        if wanted := comparison.get("labels_wanted"):
            newest = ", ".join(wanted[:3])
            table.add_row("labels wanted", f"{comparison['unlabelled']} disagreements, the newest: {newest}")
    for name, problem in (state.get("notify") or {}).items():
        table.add_row("messages wait", f"{name}: {problem}")
    if state.get("problem"):
        table.add_row("problem", str(state["problem"]))
    return table


def drift(url: Url = None, service: Service = None, storage: StorageUri = None, as_json: Json = False) -> None:
    """The drift tests by scope. Exit code 1 while an alarm stands. With --storage: the alarm of the last snapshot."""
    found = _state(url, service, storage)["drift"]
    if as_json:
        show_json(found)
    else:
        table = Table("scope", "level", "statistic", "threshold", "instances", box=None)
        for name, row in sorted(found["scopes"].items()):
            figures = (f"{row['level']:.2f}", f"{row['statistic']:.3g}", f"{row['threshold']:.3g}")
            table.add_row(name, *figures, str(row["instances"]))
        out.print(table)
        said = "no alarm" if is_tested({"drift": found}) else NOT_TESTED
        out.print(f"alarm: {found['alarm']['scope']}" if found["alarm"] else said)
    finish(NOT_FINE if found["alarm"] else FINE)


def trials(
    url: Url = None,
    service: Service = None,
    storage: StorageUri = None,
    episode: Annotated[str | None, typer.Argument(help="Episode [default: the newest].")] = None,
    as_json: Json = False,
) -> None:
    """The trials of an episode's search. Exit code 1 when there are none."""
    records = episodes(url, service, storage)
    record = named(records, episode) if episode else records[-1] if records else {}
    found = (record.get("search") or {}).get("trials", [])
    if as_json:
        show_json(found)
    else:
        table = Table(
            "trial", "placement", "rank", "learning rate", "score", "reference", "seconds", "status", box=None
        )
        for row in found:
            config = row["config"]
            place = (str(config["placement"]), str(config["adapter_rank"]), f"{config['learning_rate']:g}")
            figures = (_figure(row["score"]), _figure(row["reference_accuracy"]), _figure(row["seconds"]))
            table.add_row(str(row["trial_id"]), *place, *figures, str(row["status"]))
        out.print(table if found else "no trials")
    finish(FINE if found else NOT_FINE)


def _figure(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


# ------------------------------------------------------------ asking


def ask(url: str | None, service: str | None, name: str, reason: str, as_json: bool, **arguments: str) -> None:
    """Send a command, wait until it was handled, say how; exit code 1 when it was refused."""
    why = given(reason)
    client = connect(url, service)
    try:
        sent = client.command(name, why, **arguments)
        record = _answer(client, str(sent["command_id"]))
    finally:
        client.close()
    if as_json:
        show_json(record)
    else:
        out.print(f"{name}: {'done' if record['accepted'] else 'refused: ' + str(record['message'])}")
    finish(FINE if record["accepted"] else NOT_FINE)


def _answer(client: Client, command_id: str) -> dict[str, Any]:
    """How a pass handled the command, from the journal's events."""
    for event in client.events(ANSWER_S):
        if event["event"] == "command" and event["body"]["command_id"] == command_id:
            found: dict[str, Any] = event["body"]
            return found
    raise ServiceError(f"the command was queued but not handled within {ANSWER_S:.0f} s; see heal status")


def _plain(name: str) -> Callable[..., None]:
    def command(reason: Reason, url: Url = None, service: Service = None, as_json: Json = False) -> None:
        ask(url, service, name, reason, as_json)

    command.__name__ = name
    return command


def start(
    reason: Reason,
    url: Url = None,
    service: Service = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be started.")] = False,
    as_json: Json = False,
) -> None:
    """Open an episode by hand, on the recent traffic."""
    if not dry_run:
        return ask(url, service, "start", reason, as_json)
    state = _state(url, service)
    obstacle = "paused" if state["paused"] else f"phase {state['phase']}" if state["episode"] else ""
    found = {"would_start": not obstacle, "obstacle": obstacle, "serves": state["stable"], "mode": state["mode"]}
    if as_json:
        show_json(found)
    else:
        out.print(f"would not start: {obstacle}" if obstacle else f"would start, mode {state['mode']}")
    return finish(NOT_FINE if obstacle else FINE)


def mode(
    new: Annotated[Mode, typer.Argument(help="How much happens without a person.")],
    reason: Reason,
    url: Url = None,
    service: Service = None,
    as_json: Json = False,
) -> None:
    """Change the mode: observe, approve or auto."""
    ask(url, service, "mode", reason, as_json, mode=new.value)


def rollback(reason: Reason, to: To = "", url: Url = None, service: Service = None, as_json: Json = False) -> None:
    """Serve what was served before, or a named digest, under a new generation."""
    ask(url, service, "rollback", reason, as_json, to=to)


# ------------------------------------------------------------ clusters


def services(as_json: Json = False) -> None:
    """The healing services of the Ray cluster on this machine. Exit code 1 when there are none."""
    from orchestrator.cli.cluster import list_services

    found = list_services()
    if as_json:
        show_json(found)
    else:
        table = Table("service", "phase", "serves", "replicas", box=None)
        for row in found:
            table.add_row(row["service"], row["phase"], short(row["stable"]), str(row["replicas"]))
        out.print(table if found else "no services")
    finish(FINE if found else NOT_FINE)


def down(
    name: Annotated[str, typer.Argument(help="Service to take down, as `heal services` names it.")],
    reason: Reason,
    as_json: Json = False,
) -> None:
    """Stop a service of the Ray cluster on this machine: its application, then its orchestrator. Records stay."""
    from orchestrator.cli.cluster import take_down

    found = take_down(name, reason)
    if as_json:
        show_json(found)
    else:
        out.print(f"stopped {name}: application {found['application'] or 'none'}, orchestrator")
