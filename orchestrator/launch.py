"""Wires the application together: the builder that `serve run serve_app:app` calls, and a local start for the demo.

The one place that knows Serve's deployment options, the model, the storage and the orchestrator at once.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from ray import serve
from ray.serve import Application

from orchestrator.calls import parse_receivers
from orchestrator.errors import HealError, ServiceError
from orchestrator.keys import heal_home, load_keys
from orchestrator.models import fetch_model, load_published_spec, publish_model
from orchestrator.settings import HealSettings, ServiceConfig
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage
from serve_app.replica import ModelServer
from serve_app.trial_run import try_model

APPLICATION = "heal"  # name of a local start's Serve application
REPLICA_START_CPUS = 0.1  # two replicas at Serve's default of 1 CPU would leave a 2-core machine none for trials


class ServiceArgs(BaseModel):
    """Arguments of `serve_app:app` beside the healing settings."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(default=None, description="path of the model spec; None: the embedded digits model")
    storage: str | None = Field(default=None, description="storage URI of all records; None: a folder in HEAL_HOME")
    service: str | None = Field(default=None, description="name of the service; None: the model's name")
    replicas: int = Field(default=2, ge=1, description="replicas of the model")
    num_cpus: float = Field(
        default=REPLICA_START_CPUS, ge=0, description="CPUs a replica reserves (a Ray resource, not a limit)"
    )
    num_gpus: float = Field(default=0, ge=0, description="GPUs a replica reserves; the model runs on a GPU when > 0")
    num_threads: int = Field(default=1, ge=1, description="torch threads of a replica")
    max_batch_size: int = Field(default=32, ge=1, description="rows of one forward pass at most")
    max_ongoing_requests: int = Field(default=64, ge=1, description="requests a replica holds at once")
    store: str = Field(
        default="inputs", pattern="^(inputs|none)$", description="inputs: sample traffic for healing; none: keep none"
    )


def _settings_fields() -> dict[str, Any]:
    hints = get_type_hints(HealSettings)
    return {f.name: (hints[f.name], Field(f.default, description=f.metadata["doc"])) for f in fields(HealSettings)}


AppArgs = create_model("AppArgs", __base__=ServiceArgs, **_settings_fields())
AppArgs.__doc__ = "Every argument of `serve_app:app`, each with a default."


def app(args: AppArgs) -> Application:  # type: ignore[valid-type]
    """Build the application: publish the model, bind its replicas.

    Args:
        args: see `AppArgs`; `serve run serve_app:app key=value ...` fills it.

    Raises:
        SpecError, DataError, StorageError: the message names field, expectation and value.
    """
    return _bound(args, _published(args))


# Serve hands over a dict unless the annotation is the class itself; this module's annotations are strings.
app.__annotations__["args"] = AppArgs


def _published(args: ServiceArgs) -> ServiceConfig:
    """The service's configuration, its model on the storage."""
    model = Path(args.model) if args.model else _demo_model()
    spec = load_spec(model)
    storage = _absolute(args.storage or str(heal_home() / "storage" / spec.name))
    settings = HealSettings.from_dict({f.name: getattr(args, f.name) for f in fields(HealSettings)})
    parse_receivers(settings.notify)  # a URL that is none should end a deployment, not an orchestrator
    base = publish_model(open_storage(storage), spec)
    folder = fetch_model(open_storage(storage), base)
    try_model(folder, load_published_spec(folder))
    return ServiceConfig(args.service or spec.name, storage, base, settings, time.time())


def _bound(args: ServiceArgs, config: ServiceConfig) -> Application:
    deployment = ModelServer.options(
        name=config.service,
        num_replicas=args.replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "runtime_env": _environment(args),
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind(
        config,
        token_digests=load_keys(config.service).token_digests(),
        device="cuda" if args.num_gpus > 0 else "cpu",
        max_batch_size=args.max_batch_size,
        num_threads=args.num_threads,
        store=args.store,
    )


def _environment(args: ServiceArgs) -> dict[str, Any]:
    """Of the replicas, and so of the orchestrator and the searches that they make."""
    return {"env_vars": {"OMP_NUM_THREADS": str(args.num_threads)}}


def default_app() -> Application:
    """The application with every argument at its default; bound as `serve_app:default_app`."""
    return app(AppArgs())


def _absolute(storage: str) -> str:
    """A local folder's URI must mean the same in every process."""
    return storage if "://" in storage else str(Path(storage).expanduser().resolve())


def _demo_model() -> Path:
    from serve_app.digits.prepare import prepare  # scikit-learn and torchvision only where they are needed

    return prepare().folder / "model.yaml"


class Local(NamedTuple):
    """Where a local start answers: `url` without a trailing slash; `dashboard` is Ray's, "" without one."""

    url: str
    dashboard: str


def start_local(args: AppArgs, port: int = 0, **ray_init: Any) -> Local:  # type: ignore[valid-type]
    """Start Ray, Serve's HTTP proxy on loopback and the application; whatever comes of it, call `stop_local` after it.

    Args:
        args: as for `app`.
        port: HTTP port; 0: a free one.
        ray_init: passed to `ray.init` when Ray is not running yet.

    Returns:
        The application's base URL, and the dashboard's.

    Raises:
        ServiceError: Ray or Serve did not start, or the replicas did not; the message says why.
        SpecError, DataError, StorageError: the model cannot be served.
    """
    import ray

    port, dashboard = port or free_port(), ""
    with ThreadPoolExecutor(1) as aside:
        ready = aside.submit(_measured, args)  # while Ray's processes start
        try:
            if not ray.is_initialized():
                dashboard = ray.init(**ray_init).dashboard_url or ""
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(_bound(args, ready.result()), name=APPLICATION, route_prefix="/")
        except HealError:
            raise
        except Exception as error:  # Ray raises plain ones
            raise ServiceError(f"the service must start, and did not: {type(error).__name__}: {error}") from error
    return Local(f"http://127.0.0.1:{port}", f"http://{dashboard}" if dashboard else "")


def _measured(args: ServiceArgs) -> ServiceConfig:
    """Publish the model and measure its drift baseline, which the orchestrator would have a task do after its start."""
    from tuning.prepare import prepare_base

    config = _published(args)
    prepare_base(config.storage, config.base, device="cpu")
    return config


def warm_workers(args: AppArgs, num_workers: int = 2) -> list[Any]:  # type: ignore[valid-type]
    """Have idle workers import what a search and its trials need; the first search then starts in them.

    Args:
        args: of the service: a worker serves actors of its own environment only.
        num_workers: processes; a search takes one and each trial at a time another.

    Returns:
        Handles that are ready when the imports are done. Workers stay warm for as long as Ray keeps idle ones.
    """
    import ray

    task = ray.remote(num_cpus=0, runtime_env=_environment(args))(_import_search)
    return [task.options(name="heal-warm").remote() for _ in range(num_workers)]


def _import_search() -> None:
    import tuning.search_actor
    import tuning.tune_trial  # noqa: F401


def stop_local() -> None:
    """Stop the application, then the local Ray, and with it Serve's own actors and every detached one.

    Not `serve.shutdown`: there the controller kills itself under its caller, and the raylet reports a failed task.
    """
    import ray
    from ray.serve.context import _set_global_client

    try:
        if ray.is_initialized():
            for name in serve.status().applications:
                serve.delete(name)
            _set_global_client(None)  # a later Ray of this process may have the same job id
    finally:
        ray.shutdown()


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
