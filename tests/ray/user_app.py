"""A classifier as a user might have it, and the same one made healable: the lines that differ are marked.

Without `from __future__ import annotations`: in a pickled ingress FastAPI cannot resolve annotations that are strings.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import Body, FastAPI
from ray import serve
from safetensors.torch import load_file

from serve_app.healable import Healable  # changed line 1

plain_api = FastAPI()
healable_api = FastAPI()
Images = Annotated[list[Any], Body(description="pixels, nested like (N, 16, 16, 3)")]


def _module(folder: str) -> torch.nn.Module:
    code: dict[str, Any] = {}
    exec((Path(folder) / "stripes_net.py").read_text(), code)
    module: torch.nn.Module = code["build"]()
    module.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
    return module.eval()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(plain_api)
class PlainClassifier:
    def __init__(self, folder: str) -> None:
        self.model = _module(folder)

    @plain_api.post("/classify")
    def classify(self, images: Images) -> dict[str, Any]:
        batch = torch.from_numpy(np.asarray(images, dtype=np.uint8))
        with torch.inference_mode():
            logits = self.model(batch)
        return {"classes": logits.argmax(1).tolist()}


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(healable_api)
class HealableClassifier:
    def __init__(self, folder: str, storage: str, settings: dict[str, Any]) -> None:
        self.model = Healable(  # changed lines 2-4
            _module(folder), spec=f"{folder}/model.yaml", storage=storage, service="users-own", **settings
        )

    @healable_api.post("/classify")
    def classify(self, images: Images) -> dict[str, Any]:
        batch = torch.from_numpy(np.asarray(images, dtype=np.uint8))
        with torch.inference_mode():
            logits = self.model(batch)
        return {"classes": logits.argmax(1).tolist()}
