"""`heal demo` and `heal rehearse`: the commands; what they do is in `demo` and `rehearse`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.progress import Progress

from orchestrator.cli.console import FINE, NOT_FINE, Json, err, finish, out, show_json
from orchestrator.errors import HealError, SpecError
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
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: a free one.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send at least.")] = 1000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas to serve with.")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for a verdict.")] = 900.0,
    storage: Annotated[str | None, typer.Option(help="Where the records go [default: a fresh folder].")] = None,
    dashboard: Annotated[bool, typer.Option(help="Start Ray's dashboard too.")] = False,
    setting: Settings = None,
    as_json: Json = False,
) -> None:
    """Start a real service, let its traffic drift, watch it heal. Exit code 0: healed; 1: any other verdict."""
    _check_labels(labels)
    settings = parse_settings(setting)
    from orchestrator.cli.demo import DemoOptions, run_demo, run_folder
    from orchestrator.cli.inputs import demo_inputs
    from orchestrator.cli.report import check_report_path
    from orchestrator.cli.view import View

    check_report_path(report)
    inputs = demo_inputs(model, clean, drifted, evaluation)
    kept = storage or str(run_folder())
    options = DemoOptions(labels, port, replicas, requests, timeout, kept, dashboard, settings)
    with View(err if as_json else out) as view:
        found = run_demo(inputs, options, view)
    _finish(found, report, as_json, kept)
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
    from orchestrator.cli.rehearse import Rehearsal, RehearsalOptions, failed_rehearsal, rehearsal_inputs
    from orchestrator.cli.report import check_report_path

    check_report_path(report)
    inputs = rehearsal_inputs(model, traffic, evaluation, labels)
    bar = Progress(console=err, disable=not err.is_terminal)  # a log gets lines, not a bar
    with tempfile.TemporaryDirectory(prefix="heal-rehearsal-") as scratch, bar as progress:
        task = progress.add_task("rehearsing", total=len(inputs.traffic))

        def show(trial: TrialResult) -> None:
            config = trial.config
            progress.console.print(
                f"trial {trial.trial_id}: {config.placement} rank {config.adapter_rank} score {trial.score:.3f} "
                f"({trial.status}, {trial.seconds:.1f} s)"
            )

        options = RehearsalOptions(labels, storage or scratch, settings)
        rehearsal = Rehearsal(inputs, options, lambda rows: progress.advance(task, rows), show)
        try:
            found = rehearsal.run()
        except HealError as error:
            found = failed_rehearsal(str(error), settings)
    _finish(found, report, as_json, storage)
    finish(FINE if found["verdict"] in (Verdict.HEALED, Verdict.NO_DRIFT) else NOT_FINE)


def _finish(report: dict[str, Any], path: Path, as_json: bool, storage: str | None) -> None:
    from orchestrator.cli.report import next_steps, summary_table, write_report

    write_report(report, path)
    if as_json:
        show_json(report)
        return
    out.print(summary_table(report))
    for line in (f"report: {path}", *next_steps(report, storage)):
        out.print(line, markup=False, highlight=False)


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
