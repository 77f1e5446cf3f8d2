"""What all commands share: output as text or JSON, and how a command ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.errors import NotFound, SpecError
from orchestrator.storage import Storage, open_storage

FINE, NOT_FINE, CANNOT = 0, 1, 2  # exit codes: all is well; a verdict that is not, or nothing to do; usage or failure

WIDTH = 160  # of what is not a terminal: a log keeps its lines whole

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else WIDTH)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[
    str | None, typer.Option("--url", envvar="HEAL_URL", help="The running service [default: http://127.0.0.1:8000].")
]
Service = Annotated[str | None, typer.Option("--service", help="Its name, to find its token on this machine.")]
StorageUri = Annotated[str | None, typer.Option("--storage", help="Read a service's records here instead.")]
Where = Annotated[str, typer.Option("--storage", help="Storage URI of the service.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; goes into the journal.")]


def show_json(value: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2, default=str))


def finish(code: int) -> None:
    """End the command with an exit code."""
    raise typer.Exit(code)


def given(reason: str) -> str:
    """A reason that says something.

    Raises:
        SpecError: it is empty.
    """
    if not reason.strip():
        raise SpecError("--reason must say why; got an empty text")
    return reason.strip()


def existing(uri: str) -> Storage:
    """A storage with a service's records on it: a mistyped folder must not pass for an empty one, nor be made.

    Raises:
        NotFound: there are none.
        StorageError: it cannot be read.
    """
    local = Path(uri.removeprefix("file://")).expanduser() if "://" not in uri or uri.startswith("file://") else None
    if local is not None and not local.is_dir():
        raise NotFound(f"--storage must be a folder with a service's records, or a URI; {uri} is not there")
    storage = open_storage(uri)
    if not any(storage.list(prefix) for prefix in ("journal/", "adapters/", "models/")):
        raise NotFound(f"no service keeps its records at {storage.uri}; check --storage")
    return storage
