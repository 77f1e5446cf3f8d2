"""Plain Ray Serve with the same model: FastAPI ingress, `@serve.batch`, raw bytes in, JSON out. No monitoring.

Without `from __future__ import annotations`: in a pickled ingress FastAPI cannot resolve annotations that are strings.
"""

from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from ray import serve

from orchestrator.models import fetch_model, load_published_spec
from orchestrator.storage import open_storage
from tuning.base_model import build_module

api = FastAPI()


@serve.deployment(
    name="plain",
    max_ongoing_requests=64,
    ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
)
@serve.ingress(api)
class PlainServer:
    def __init__(self, storage: str, base: str) -> None:
        torch.set_num_threads(1)
        folder = fetch_model(open_storage(storage), base)
        self._spec = load_published_spec(folder)
        self._module = build_module(folder, self._spec)

    @api.post("/infer")
    async def infer(self, request: Request) -> Any:
        raw = await request.body()
        image = np.frombuffer(raw, self._spec.numpy_dtype).reshape(-1, *self._spec.input_shape)
        return {"logits": await self._run(image)}

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def _run(self, images: list[np.ndarray]) -> list[Any]:
        with torch.inference_mode():
            logits = self._module(torch.from_numpy(np.concatenate(images))).numpy()
        ends = np.cumsum([len(i) for i in images])[:-1]
        return [part.tolist() for part in np.split(logits, ends)]
