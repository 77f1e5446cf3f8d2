"""The Ray side of a heartbeat: finds the orchestrator actor by import path, calls it, names its failures.

Called by `Healable` (heartbeats) and `ModelServer` (`/healing` routes). The factory is named in
`settings.ORCHESTRATOR_FACTORY` because it lies in a higher layer.
"""

from __future__ import annotations

import importlib
import os
import socket
import uuid
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from orchestrator.errors import ServiceError
from orchestrator.messages import Report, Target
from orchestrator.settings import ORCHESTRATOR_FACTORY, ServiceConfig
from serve_app.heartbeat import LinkError


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


def replica_identity() -> tuple[str, float]:
    """Tag of the Serve replica this process is, and when its application was deployed (seconds since the epoch).

    Outside Serve: a tag of host and process, and 0.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not ray.is_initialized():
        return _process_tag(), 0.0
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return _process_tag(), 0.0
    application = serve.status().applications.get(context.app_name)
    return context.replica_tag, float(application.last_deployed_time_s) if application else 0.0


def _process_tag() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
