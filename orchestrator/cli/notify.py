"""`heal notify`: try the receivers of a service's messages, and show the secret that signs them."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from orchestrator.calls import TYPE, Call, parse_receivers
from orchestrator.cli.console import FINE, NOT_FINE, finish, out
from orchestrator.cli.notes import known_keys
from orchestrator.notifier import send


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(notify)


def notify(
    urls: Annotated[str, typer.Argument(help="As in the setting notify: URLs with commas between.")],
    service: Annotated[str, typer.Option(help="Whose keys sign.")],
    show_secret: Annotated[bool, typer.Option(help="Print the secret that receivers check signatures with.")] = False,
) -> None:
    """Send a test message to each receiver. Exit code 1 when one does not take it."""
    keys = known_keys(service)
    if show_secret:
        out.print(keys.webhook_secret, markup=False, highlight=False)
    todo = "nothing; receivers work"
    call = Call(
        f"{service}/test-{time.time_ns()}", f"{TYPE}.test", time.time(), service, "a test", "", todo, "info", {}
    )
    failed = False
    for receiver in parse_receivers(urls):
        try:
            said = "ok" if send(receiver, keys.webhook_secret, call) else "refuses the message"
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        failed |= said != "ok"
        out.print(f"{receiver.name:<40} {said}", markup=False, highlight=False)
    finish(NOT_FINE if failed else FINE)
