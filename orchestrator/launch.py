"""Wires the application together: the builder that `serve run serve_app:app` calls, and a local start for the demo.

The one place that knows Serve's deployment options, the model, the storage and the orchestrator at once.
"""

from __future__ import annotations

import socket
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from ray import serve
from ray.serve import Application

from orchestrator.keys import heal_home, load_keys
from orchestrator.registry import publish_model
from orchestrator.settings import HealSettings, ServiceConfig
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage
from serve_app.replica import ModelServer

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
    values: ServiceArgs = args
    model = Path(values.model) if values.model else _demo_model()
    spec = load_spec(model)
    storage = _absolute(values.storage or str(heal_home() / "storage" / spec.name))
    settings = HealSettings.from_dict({f.name: getattr(values, f.name) for f in fields(HealSettings)})
    service = values.service or spec.name
    config = ServiceConfig(service, storage, publish_model(open_storage(storage), spec), settings, time.time())
    deployment = ModelServer.options(
        name=service,
        num_replicas=values.replicas,
        max_ongoing_requests=values.max_ongoing_requests,
        ray_actor_options={
            "num_cpus": values.num_cpus,
            "num_gpus": values.num_gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(values.num_threads)}},
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind(
        config,
        token_digests=load_keys(service).token_digests(),
        device="cuda" if values.num_gpus > 0 else "cpu",
        max_batch_size=values.max_batch_size,
        num_threads=values.num_threads,
        store=values.store,
    )


def default_app() -> Application:
    """The application with every argument at its default (for `serve build` and `serve deploy`)."""
    return app(AppArgs())


def _absolute(storage: str) -> str:
    """A local folder's URI must mean the same in every process."""
    return storage if "://" in storage else str(Path(storage).expanduser().resolve())


def _demo_model() -> Path:
    from serve_app.digits.prepare import prepare  # scikit-learn and torchvision only where they are needed

    return prepare().folder / "model.yaml"


def start_local(args: AppArgs, port: int = 0, **ray_init: Any) -> str:  # type: ignore[valid-type]
    """Start Ray (unless it runs), Serve's HTTP proxy on loopback and the application.

    Args:
        args: as for `app`.
        port: HTTP port; 0: a free one.
        ray_init: passed to `ray.init` when Ray is not running yet.

    Returns:
        The application's base URL, without a trailing slash.
    """
    import ray

    if not ray.is_initialized():
        ray.init(**ray_init)
    port = port or free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(args), name="heal", route_prefix="/")
    return f"http://127.0.0.1:{port}"


def stop_local() -> None:
    """Stop Serve and the local Ray, and with it every detached actor."""
    import ray

    serve.shutdown()
    ray.shutdown()


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
