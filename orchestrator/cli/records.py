"""Commands that read a service's records: its journal and its adapters.

`--storage` reads them where they lie, without a running service; `history` and `explain` ask a running one when no
storage is named.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.client import connect, short
from orchestrator.cli.console import (
    FINE,
    NOT_FINE,
    Json,
    Service,
    StorageUri,
    Url,
    Where,
    existing,
    finish,
    out,
    show_json,
)
from orchestrator.cli.evidence import bundle, checks
from orchestrator.cli.labels import labels_import
from orchestrator.cli.notes import known_keys, note_problems
from orchestrator.cli.stored import stored_episodes
from orchestrator.cli.upkeep import adapters_gc, traffic_purge
from orchestrator.errors import HealError, NotFound, SpecError
from orchestrator.journal import journal_key, verify_journal
from orchestrator.registry import list_adapters, load_adapter
from orchestrator.storage import Storage


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(history)
    app.command()(explain)
    app.command()(evidence)
    audit = typer.Typer(help="The journal's integrity.", no_args_is_help=True)
    audit.command("verify")(audit_verify)
    app.add_typer(audit, name="audit")
    adapters = typer.Typer(help="The adapters on a storage.", no_args_is_help=True)
    for name, command in (
        ("ls", adapters_ls),
        ("show", adapters_show),
        ("verify", adapters_verify),
        ("gc", adapters_gc),
    ):
        adapters.command(name)(command)
    app.add_typer(adapters, name="adapters")
    labels = typer.Typer(help="True labels that come late.", no_args_is_help=True)
    labels.command("import")(labels_import)
    app.add_typer(labels, name="labels")
    traffic = typer.Typer(help="The traffic on a storage.", no_args_is_help=True)
    traffic.command("purge")(traffic_purge)
    app.add_typer(traffic, name="traffic")


# ------------------------------------------------------------ episodes


def episodes(url: str | None, service: str | None, storage: str | None) -> list[dict[str, Any]]:
    """Every episode's record, oldest first, the open one last."""
    if storage is None:
        client = connect(url, service)
        try:
            live: list[dict[str, Any]] = client.get("/healing/episodes")
        finally:
            client.close()
        return live
    return stored_episodes(storage)


def history(url: Url = None, service: Service = None, storage: StorageUri = None, as_json: Json = False) -> None:
    """Every episode in a line. Exit code 1 when there is none."""
    found = episodes(url, service, storage)
    if as_json:
        show_json(found)
    else:
        table = Table("episode", "opened", "kind", "verdict", "adapter", "reason", box=None)
        for row in found:
            kind = (row["diagnosis"] or {}).get("kind", "-")
            verdict = f"{row['verdict'] or 'open'}{' (provisional)' if row['provisional'] else ''}"
            table.add_row(row["id"], when(row["opened_s"]), kind, verdict, short(row["winner"]), row["reason"])
        out.print(table if found else "no episodes")
    finish(FINE if found else NOT_FINE)


def explain(
    episode: Annotated[str, typer.Argument(help="Its id, as `heal history` lists it.")],
    url: Url = None,
    service: Service = None,
    storage: StorageUri = None,
    as_json: Json = False,
) -> None:
    """Why an episode went as it did: alarm, diagnosis, trials, gate, rollout, each with its figures."""
    record = named(episodes(url, service, storage), episode)
    if as_json:
        show_json(record)
        return
    for line in story(record):
        out.print(line, markup=False, highlight=False)


def evidence(
    episode: Annotated[str, typer.Argument(help="Its id, as `heal history` lists it.")],
    url: Url = None,
    service: Service = None,
    storage: StorageUri = None,
    as_json: Json = False,
) -> None:
    """What an episode's verdict rests on: figures against limits, the adapter, the journal entries that prove it.

    Adapter and journal are read and verified with --storage only. Exit code 1 when one of them does not verify.
    """
    record = named(episodes(url, service, storage), episode)
    found = bundle(record, existing(storage) if storage else None)
    if as_json:
        show_json(found)
    else:
        for line in checks(found):
            out.print(line, markup=False, highlight=False)
    finish(NOT_FINE if found["problems"] else FINE)


def named(records: list[dict[str, Any]], episode: str) -> dict[str, Any]:
    """The record of that episode.

    Raises:
        SpecError: there is none; the message names those that are.
    """
    found = {row["id"]: row for row in records}
    if episode not in found:
        raise SpecError(f"episode must be one of {', '.join(found) or 'none'}; got {episode!r}")
    return found[episode]


def story(record: dict[str, Any]) -> list[str]:
    """An episode in sentences, each with the inequality that decided."""
    lines = [f"{record['id']} opened {when(record['opened_s'])}{' by hand' if record['manual'] else ''}"]
    if alarm := record["alarm"]:
        lines.append(
            f"alarm: {alarm['scope']}, statistic {_figure(alarm['statistic'])} > {_figure(alarm['threshold'])} "
            f"after {alarm['instances']} instances under {short(alarm['digest'])}"
        )
    if diagnosis := record["diagnosis"]:
        loss = _figure(diagnosis["estimated_loss"])
        lines.append(f"diagnosis: {diagnosis['kind']}: {diagnosis['reason']} (estimated loss {loss})")
        lines += [f"  {name} {_figure(value)}" for name, value in diagnosis["evidence"].items()]
    if search := record["search"]:
        lines.append(f"search: {search['buffered']} instances, {len(search['trials'])} trials: {search['message']}")
        for trial in search["trials"]:
            config = trial["config"]
            lines.append(
                f"  {trial['trial_id']} {config['placement']} rank {config['adapter_rank']} "
                f"score {_figure(trial['score'])} {trial['status']}{'  ' + trial['error'] if trial['error'] else ''}"
            )
    if gate := record["gate"]:
        lines.append(f"gate: {gate['analysis']}: {gate['message']}")
        lines += [f"  {'ok ' if ok else 'NO '} {n} {_figure(v)}, limit {_figure(m)}" for n, v, m, ok in gate["checks"]]
    entered = sorted(record["phase_entered"].items(), key=lambda item: item[1])
    lines += [f"{when(at_s)} {phase}" for phase, at_s in entered]
    end = f"verdict: {record['verdict'] or 'open'}{' (provisional)' if record['provisional'] else ''}"
    return [*lines, f"{end}: {record['reason']}" if record["reason"] else end]


def when(at_s: float) -> str:
    """Local time, to the second."""
    return datetime.datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------ integrity


def audit_verify(storage: Where, service: Service = None, as_json: Json = False) -> None:
    """Verify every signature, every link and the end of the journal. Exit code 1 when anything is wrong.

    With --service the key of this machine's key file must have signed it; else the key that entry 0 names.
    """
    place = existing(storage)
    public_key = known_keys(service).public_key if service else journal_key(place)
    audit = verify_journal(place, public_key)
    problems = audit.problems + note_problems(place, public_key)
    if not audit.entries:
        problems.append("there is no journal")
    if as_json:
        show_json({"entries": audit.entries, "problems": problems, "pinned": service is not None})
    else:
        for problem in problems:
            out.print(problem, markup=False, highlight=False)
        trusted = f"signed by {service}" if service else "signed by the key that entry 0 names (pin it with --service)"
        out.print(f"{audit.entries} entries: " + ("problems found" if problems else f"all verify, {trusted}"))
    finish(NOT_FINE if problems else FINE)


def adapters_ls(storage: Where, as_json: Json = False) -> None:
    """Every adapter's manifest in a line. Exit code 1 when there is none."""
    found = list_adapters(existing(storage))
    if as_json:
        show_json(found)
    else:
        table = Table("digest", "base", "placement", "rank", box=None)
        for row in found:
            trial = row.get("trial") or {}
            config = trial.get("config", trial) if isinstance(trial, dict) else {}
            place = (str(config.get("placement", "-")), str(config.get("adapter_rank", "-")))
            table.add_row(short(row["digest"]), short(row.get("base")), *place)
        out.print(table if found else "no adapters")
    finish(FINE if found else NOT_FINE)


def adapters_show(digest: str, storage: Where, as_json: Json = True) -> None:
    """One adapter's manifest, configuration and tensors (shapes), as JSON. A unique prefix of the digest will do."""
    place = existing(storage)
    config, tensors, manifest = load_adapter(place, _full_digest(place, digest))
    shapes = {name: f"{value.dtype} {list(value.shape)}" for name, value in tensors.items()}
    show_json({"manifest": manifest, "config": config, "tensors": shapes})


def adapters_verify(
    storage: Where,
    digest: Annotated[str | None, typer.Argument(help="Digest or prefix [default: all].")] = None,
    as_json: Json = False,
) -> None:
    """Check that adapters hash to their digests and their manifests are signed. Exit code 1 when one does not."""
    place = existing(storage)
    keys = [key.split("/")[1] for key in place.list("adapters/") if key.endswith("/manifest.json")]
    problems: dict[str, str] = {}
    checked = [_full_digest(place, digest)] if digest else keys
    for name in checked:
        try:
            load_adapter(place, name)
        except HealError as error:
            problems[name] = str(error)
    if as_json:
        show_json({"checked": checked, "problems": problems})
    else:
        for problem in problems.values():
            out.print(problem, markup=False, highlight=False)
        out.print(f"{len(checked)} adapters, {len(problems)} problems")
    finish(NOT_FINE if problems else FINE)


def _full_digest(storage: Storage, prefix: str) -> str:
    names = {key.split("/")[1] for key in storage.list("adapters/")}
    found = sorted(name for name in names if name.startswith(prefix))
    if len(found) != 1:
        raise NotFound(f"digest must name one adapter on {storage.uri}; {prefix!r} fits {len(found)}; see adapters ls")
    return found[0]
