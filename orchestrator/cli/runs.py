"""`heal demo` and `heal rehearse`: the commands; what they do is in `demo` and `rehearse`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.progress import Progress

from orchestrator.cli.console import FINE, NOT_FINE, Json, err, finish, out, show_json
from orchestrator.errors import SpecError
from orchestrator.messages import TrialResult, Verdict
from orchestrator.settings import HealSettings

Model = Annotated[Path | None, typer.Option(help="Model spec (YAML) [default: the embedded digits].")]
Labels = Annotated[str, typer.Option(help="True labels that are told: none, all or a number of them.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A healing setting, key=value; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(demo)
    app.command()(rehearse)


def demo(
    model: Model = None,
    clean: Annotated[Path | None, typer.Option(help="Clean traffic (Parquet).")] = None,
    drifted: Annotated[Path | None, typer.Option(help="Drifted traffic (Parquet).")] = None,
    evaluation: Annotated[Path | None, typer.Option("--eval", help="Drifted, labelled, never sent as traffic.")] = None,
    labels: Labels = "none",
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("out/demo.json"),
    port: Annotated[int, typer.Option(help="HTTP port; 0: a free one.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send at least.")] = 1000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas to serve with.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a verdict.")] = 900.0,
    storage: Annotated[str | None, typer.Option(help="Where the records go [default: a fresh folder].")] = None,
    dashboard: Annotated[bool, typer.Option(help="Start Ray's dashboard too.")] = False,
    setting: Settings = None,
    as_json: Json = False,
) -> None:
    """Start a real service, let its traffic drift, watch it heal."""
    _check_labels(labels)
    settings = parse_settings(setting)
    from orchestrator.cli.demo import DemoOptions, run_demo
    from orchestrator.cli.inputs import demo_inputs
    from orchestrator.cli.view import View

    options = DemoOptions(labels, port, replicas, requests, timeout, storage, dashboard, settings)
    inputs = demo_inputs(model, clean, drifted, evaluation)
    with View(err if as_json else out) as view:
        found = run_demo(inputs, options, view)
    _finish(found, report, as_json)
    finish(FINE if found["verdict"] == Verdict.HEALED else NOT_FINE)


def rehearse(
    model: Annotated[Path, typer.Option(help="Model spec (YAML).")],
    traffic: Annotated[Path, typer.Option(help="Recorded traffic (Parquet), in order.")],
    evaluation: Annotated[Path | None, typer.Option("--eval", help="Labelled, for measuring only.")] = None,
    labels: Labels = "none",
    storage: Annotated[str | None, typer.Option(help="Keep the records here [default: nowhere].")] = None,
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("out/rehearsal.json"),
    setting: Settings = None,
    as_json: Json = False,
) -> None:
    """Replay recorded traffic offline: would it have alarmed, and what would have been done?

    Exit code 0: healed or no drift; 1: any other verdict.
    """
    _check_labels(labels)
    settings = parse_settings(setting)
    from orchestrator.cli.rehearse import Rehearsal, RehearsalOptions, rehearsal_inputs

    inputs = rehearsal_inputs(model, traffic, evaluation, labels)
    with tempfile.TemporaryDirectory(prefix="heal-rehearsal-") as scratch, Progress(console=err) as progress:
        task = progress.add_task("rehearsing", total=len(inputs.traffic))

        def show(trial: TrialResult) -> None:
            config = trial.config
            progress.console.print(
                f"trial {trial.trial_id}: {config.placement} rank {config.adapter_rank} score {trial.score:.3f} "
                f"({trial.status}, {trial.seconds:.1f} s)"
            )

        options = RehearsalOptions(labels, storage or scratch, settings)
        found = Rehearsal(inputs, options, lambda rows: progress.advance(task, rows), show).run()
    _finish(found, report, as_json)
    finish(FINE if found["verdict"] in (Verdict.HEALED, Verdict.NO_DRIFT) else NOT_FINE)


def _finish(report: dict[str, Any], path: Path, as_json: bool) -> None:
    from orchestrator.cli.report import summary_table, write_report

    write_report(report, path)
    if as_json:
        show_json(report)
        return
    out.print(summary_table(report))
    out.print(f"report: {path}")


def _check_labels(labels: str) -> None:
    if labels not in ("none", "all") and not labels.isdecimal():
        raise SpecError(f"--labels must be none, all or a number; got {labels!r}")


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """`key=value` pairs as settings.

    Raises:
        SpecError: no `=`, an unknown setting, or a value out of range.
    """
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SpecError(f"--set must be key=value; got {pair!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError(f"--set {key} must have a plain value; got {value!r}") from error
    HealSettings.from_dict(found)
    return found
