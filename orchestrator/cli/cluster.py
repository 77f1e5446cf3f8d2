"""Services of the Ray cluster that this machine belongs to: `heal services` and `heal down`."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.errors import ServiceError
from orchestrator.journal import Journal
from orchestrator.keys import load_keys
from orchestrator.settings import NAMESPACE
from orchestrator.storage import open_storage

PREFIX = "heal-"  # of an orchestrator actor's name
CALL_S = 10.0


def _join() -> Any:
    """Ray, connected to the running cluster.

    Raises:
        ServiceError: there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServiceError(f"no Ray cluster runs here, or it cannot be joined: {error}") from error
    return ray


def _actors(ray: Any) -> list[str]:
    listed = ray.util.list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in listed if a["namespace"] == NAMESPACE and a["name"].startswith(PREFIX))


def list_services() -> list[dict[str, Any]]:
    """Name, phase, stable digest and number of replicas of each service."""
    ray = _join()
    found = []
    for name in _actors(ray):
        actor = ray.get_actor(name, NAMESPACE)
        if not hasattr(actor, "heartbeat"):  # a search's actor
            continue
        try:
            state = ray.get(actor.state.remote(), timeout=CALL_S)
        except ray.exceptions.RayError as error:
            problem = type(error).__name__
            found.append({"service": name.removeprefix(PREFIX), "phase": problem, "stable": None, "replicas": 0})
            continue
        row = {key: state[key] for key in ("service", "phase", "stable", "storage")}
        found.append(row | {"replicas": sum(r["live"] for r in state["replicas"])})
    return found


def take_down(service: str, reason: str) -> dict[str, Any]:
    """Delete the service's Serve application (else its replicas would make a new orchestrator), then the actor.

    Raises:
        ServiceError: there is no such service.
    """
    ray = _join()
    from ray import serve

    if PREFIX + service not in _actors(ray):
        names = ", ".join(row["service"] for row in list_services()) or "none"
        raise ServiceError(f"no service {service!r} runs here; running: {names}")
    actor = ray.get_actor(PREFIX + service, NAMESPACE)
    state = ray.get(actor.state.remote(), timeout=CALL_S)
    application = next((name for name, app in serve.status().applications.items() if service in app.deployments), None)
    if application is not None:
        serve.delete(application)
    ray.get(actor.retire.remote(), timeout=CALL_S)
    ray.kill(actor, no_restart=True)
    journal = Journal(open_storage(state["storage"]), load_keys(service))
    journal.append("taken_down", {"reason": reason, "actor": "heal down"}, journal.replay() or {})
    return {"service": service, "application": application, "reason": reason}
