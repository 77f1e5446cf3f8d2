"""The command `heal`: all sub-commands, and how they fail.

Whatever a user can cause or mend ends in one line on stderr and exit code 2; a bug keeps its traceback. Heavy imports
(Ray, torch) happen inside the commands that need them, so that `heal --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from orchestrator.cli import convert, doctor, notify, records, runs, service
from orchestrator.cli.console import CANNOT
from orchestrator.errors import HealError

cli = typer.Typer(
    name="heal",
    help="Notices that a deployed PyTorch model drifts, and heals it.",
    epilog="Exit codes: 0 all is well; 1 a verdict, a check or a refusal that is not, or nothing found; 2 wrong usage, "
    "bad input or nobody answers: one line on stderr says which.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (runs, service, records, convert, doctor, notify):
    part.register(cli)


# Typer carries its own copy of click and exports only the ends of its exception tree.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: list[str] | None = None) -> None:
    """Run `heal` and exit: 0 fine, 1 the verdict is not (or there is nothing to do), 2 usage or failure."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run `heal` with these arguments (default: the process's own); the exit code."""
    try:
        code = cli(args=arguments, standalone_mode=False)
    except _USAGE_ERROR as error:
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        return _say(said or "name a command; see heal --help")
    except HealError as error:
        return _say(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted")
    return code if isinstance(code, int) else 0


def _say(message: str) -> int:
    """One line, however many the message has."""
    typer.echo("heal: " + " ".join(message.split()), err=True)
    return CANNOT
