"""The Ray side of a heartbeat: finds the orchestrator actor by import path, calls it, names its failures.

Called by `Healable` (heartbeats) and `ModelServer` (`/healing` routes). The factory is named in
`settings.ORCHESTRATOR_FACTORY` because it lies in a higher layer.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.serve.exceptions import RayServeException

from orchestrator.errors import ServiceError
from orchestrator.messages import Report, Target
from orchestrator.settings import ORCHESTRATOR_FACTORY, ServiceConfig
from serve_app.heartbeat import LinkError

log = logging.getLogger("rayheal")


class RayLink:
    """A handle of the orchestrator actor.

    Args:
        handle: the actor's.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def heartbeat(self, report: Report, timeout_s: float) -> Target:
        """Deliver a report and wait for the target; LinkError when none came."""
        try:
            target: Target = ray.get(self.handle.heartbeat.remote(report), timeout=timeout_s)
        except GetTimeoutError:
            raise LinkError(f"the orchestrator did not answer within {timeout_s:g} s", lost=False) from None
        except ActorUnavailableError as error:
            raise LinkError(f"the orchestrator is restarting: {error}", lost=False) from error
        except RayActorError as error:
            raise LinkError(f"the orchestrator died: {error}", lost=True) from error
        except RayError as error:
            raise LinkError(f"the orchestrator failed on a report: {error}", lost=False, refused=True) from error
        return target


def connect(config: ServiceConfig) -> RayLink:
    """Find or make the service's orchestrator.

    Raises:
        ServiceError: Ray is not initialised in this process, or the orchestrator cannot be made.
    """
    if not ray.is_initialized():  # else Ray would start a cluster of its own here
        raise ServiceError("Ray must be initialised in this process to heal; call ray.init() or deploy on Ray Serve")
    module, _, name = ORCHESTRATOR_FACTORY.partition(":")
    factory = getattr(importlib.import_module(module), name)
    return RayLink(factory(config))


def replica_tag() -> str:
    """Tag of the Serve replica this process is; one of host and process outside Serve."""
    context = _serve_context()
    if context is None:
        return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    return str(context.replica_tag)


def deployed_s() -> float:
    """When this replica's application was deployed (seconds since the epoch), equal on all of its replicas.

    0 outside Serve and where Serve does not say: an orchestrator that runs then keeps its settings.
    """
    context = _serve_context()
    if context is None:
        return 0.0
    try:
        found = serve.status().applications.get(context.app_name)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("Serve does not say when the application was deployed: %s", error)
        return 0.0
    return float(found.last_deployed_time_s) if found else 0.0


def _serve_context() -> Any:
    try:
        return serve.get_replica_context() if ray.is_initialized() else None
    except RayServeException:
        return None
