"""The Serve deployment: one model replica that is its own HTTP ingress.

Bound by `orchestrator.launch`. Requests are parsed and batched on the event loop, and run in one thread, so that
health checks, other requests and the heartbeat go on during a forward pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
import torch
from fastapi import FastAPI
from ray import serve

from orchestrator.errors import HealError, RequestError, ServiceError
from orchestrator.models import fetch_model, load_published_spec
from orchestrator.settings import ServiceConfig
from orchestrator.storage import open_storage
from serve_app.batcher import Batcher
from serve_app.forward import Answer, Ask
from serve_app.healable import Healable
from serve_app.ingress import build
from serve_app.link import RayLink
from serve_app.protocol import Contract
from serve_app.tokens import Roles
from serve_app.web import ModelPort
from tuning.base_model import build_module

CONTROL_TIMEOUT_S = 5.0  # for one call of the orchestrator by a /healing route
DEFAULT_BATCH_ROWS = 32


def _this_replica() -> ModelPort:
    return cast(ModelPort, serve.get_replica_context().servable_object)


def _application() -> FastAPI:
    return build(_this_replica)


class ModelReplica:
    """Serves a published model, monitored and swappable.

    Args:
        config: the service; its base is fetched from its storage.
        token_digests: SHA-256 of each bearer token to its role; empty: only inference is open.
        device: auto, cpu or cuda.
        max_batch_size: rows of one forward pass at most; a larger request runs alone.
        num_threads: torch threads.
        store: inputs or none.
        max_rows: of one request.
        max_body_bytes: of one request.
    """

    def __init__(
        self,
        config: ServiceConfig,
        token_digests: Mapping[str, str] | None = None,
        device: str = "auto",
        max_batch_size: int = DEFAULT_BATCH_ROWS,
        num_threads: int = 1,
        store: str = "inputs",
        max_rows: int = 4096,
        max_body_bytes: int = 64 << 20,
    ) -> None:
        torch.set_num_threads(num_threads)
        folder = fetch_model(open_storage(config.storage), config.base)
        spec = load_published_spec(folder)
        self.roles = Roles(token_digests or {})
        self.contract = Contract(
            spec.name, tuple(spec.input_shape), spec.input_dtype, spec.num_classes, max_rows, max_body_bytes
        )
        self._max_batch_size = max_batch_size
        self._batcher = Batcher(self._run, max_batch_size)
        # The thread count is a property of the calling thread in OpenMP.
        self._thread = ThreadPoolExecutor(1, "forward", torch.set_num_threads, (num_threads,))
        self._healable = Healable(
            build_module(folder, spec),
            spec=spec,
            storage=config.storage,
            service=config.service,
            base=config.base,
            device=device,
            store=store,
            deployed_s=config.deployed_s,
            **config.settings.to_dict(),
        )

    def versions(self) -> tuple[str, ...]:
        """Versions that can be asked for."""
        return self._healable.versions

    def token(self, answer: Answer) -> str:
        """Feedback token of an answer."""
        return self._healable.token(answer)

    def feedback(self, items: list[tuple[str, int, int]]) -> dict[str, int]:
        """Take (token, row, class) triples; counts by outcome."""
        return self._healable.feedback(items)

    async def infer(self, ask: Ask) -> Answer:
        """Answer one request, batched with others; a large one runs alone."""
        if 2 * len(ask.inputs) > self._max_batch_size:
            found = (await self._run([ask]))[0]
        else:
            found = await self._batcher.submit(ask)
        if isinstance(found, Exception):
            raise found
        return found

    async def _run(self, asks: list[Ask]) -> list[Answer | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, asks)

    def _answer(self, asks: list[Ask]) -> list[Answer | Exception]:
        """Answer a batch; when it fails, each request alone, so that one does not fail its neighbours."""
        try:
            return list(self._healable.infer_many(asks))
        except Exception as error:
            if len(asks) == 1:
                return [error]
            return [self._answer([ask])[0] for ask in asks]

    async def control(self, method: str, *args: Any) -> Any:
        """Call the orchestrator.

        Raises:
            ServiceError: it is away (503), or does not answer in time.
            RequestError: it refused what was asked (409).
        """
        link = self._healable.link
        if not isinstance(link, RayLink):
            raise ServiceError("the orchestrator is away; inference goes on, try again in a few seconds")
        try:
            call = getattr(link.handle, method).remote(*args)
            return await asyncio.wait_for(asyncio.wrap_future(call.future()), CONTROL_TIMEOUT_S)
        except TimeoutError:
            raise ServiceError(f"the orchestrator did not answer within {CONTROL_TIMEOUT_S:g} s; try again") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HealError):
                raise RequestError(str(error.cause), 409) from error
            raise ServiceError(f"the orchestrator failed: {type(error.cause).__name__}") from error
        except ray.exceptions.RayError:
            raise ServiceError("the orchestrator is away; inference goes on, try again in a few seconds") from None

    def __del__(self) -> None:
        """Serve calls this when the replica stops: write what was sampled."""
        healable = getattr(self, "_healable", None)
        if healable is not None:
            healable.close()


ModelServer = serve.deployment(serve.ingress(_application)(ModelReplica), name="ModelServer")
