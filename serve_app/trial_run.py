"""One forward pass of a published model before it is deployed: what does not fit is said in one line, not by a replica.

Called by `orchestrator.launch`. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from orchestrator.errors import SpecError
from orchestrator.spec import ModelSpec
from tuning.base_model import build_module


def try_model(folder: Path, spec: ModelSpec) -> None:
    """Build the model and answer two inputs of zeros, on the CPU.

    Args:
        folder: as `models.fetch_model` gives it.
        spec: the published spec.

    Raises:
        SpecError: the factory cannot be used, the weights do not fit it, or its module does not take `input` or does
            not return a logit for each of `classes`.
    """
    module = build_module(folder, spec)
    inputs = torch.from_numpy(np.zeros((2, *spec.input_shape), dtype=spec.numpy_dtype))
    shape = ["N", *spec.input_shape]
    try:
        with torch.inference_mode():
            logits = module(inputs)
    except Exception as error:  # the user's code may raise anything
        first = (str(error).splitlines() or [""])[0][:200]
        raise SpecError(
            f"forward must take input {spec.input_dtype} {shape}; it raised {type(error).__name__}: {first}"
        ) from error
    got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if got != [2, spec.num_classes]:
        raise SpecError(
            f"forward must return logits [N, {spec.num_classes}], one for each of classes; got {got} for N = 2"
        )
