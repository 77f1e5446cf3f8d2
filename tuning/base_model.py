"""Builds the base model from its published folder, and reads the embedding out of its forward pass.

Called by replicas, trials and `heal doctor`: all of them must see the same bytes run in the same way. Knows nothing of
Ray, of adapters or of how a spec was parsed.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from orchestrator.errors import SpecError
from tuning.sketch import image_sketch

if TYPE_CHECKING:
    from orchestrator.drift.baseline import Sample
    from orchestrator.spec import ModelSpec

_IMPORT_LOCK = threading.Lock()  # sys.path and sys.modules are process-wide
_TAP_LOCK = threading.Lock()


def resolve_device(name: str) -> torch.device:
    """Device for `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        SpecError: another name, or `cuda` on a machine without it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SpecError(f"device must be auto, cpu or cuda; got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SpecError("device cuda was asked for, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def build_module(folder: Path, spec: ModelSpec) -> nn.Module:
    """Base model in eval mode, built by the spec's factory, with its weights loaded.

    Args:
        folder: a published `models/<digest>` folder (`code/`, `weights.safetensors`), or the folder of a spec that is
            not published yet (the code and weights lie beside it). Factories of installed packages work too.
        spec: names `factory`, `kwargs` and `weights`.

    Returns:
        The module; every floating tensor has the factory's dtype, whatever dtype the file stores.

    Raises:
        SpecError: the factory cannot be imported or returns no module, or the weights do not fit it.
    """
    folder = Path(folder)
    code = folder / "code" if (folder / "code").is_dir() else folder
    factory = _import_factory(code, spec.factory)
    try:
        module = factory(**dict(spec.kwargs or {}))
    except TypeError as error:
        raise SpecError(f"factory {spec.factory} does not take kwargs {sorted(spec.kwargs or {})}: {error}") from error
    if not isinstance(module, nn.Module):
        raise SpecError(f"factory {spec.factory} must return a torch.nn.Module; got {type(module).__name__}")
    weights = _weights_file(folder, spec)
    if weights is not None:
        load_weights(module, load_file(weights), weights.name)
    return module.eval()


def _weights_file(folder: Path, spec: ModelSpec) -> Path | None:
    published = folder / "weights.safetensors"
    if published.exists():
        return published
    if not spec.weights:
        return None
    beside = folder / spec.weights
    if not beside.exists():
        raise SpecError(f"weights must be a safetensors file beside the spec; {beside} does not exist")
    return beside


def load_weights(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copies `tensors` into `module`, strictly; a tied tensor needs to be there once only.

    Args:
        module: receives the values, cast to its own dtypes.
        tensors: by state-dict name.
        source: file name, for messages.

    Raises:
        SpecError: names up to five missing, unexpected or wrong-shaped tensors of each sort.
    """
    state = module.state_dict()
    present = {state[name].data_ptr() for name in tensors if name in state and state[name].numel()}
    missing = [k for k, v in state.items() if k not in tensors and v.data_ptr() not in present]
    unexpected = [k for k in tensors if k not in state]
    shapes = [
        f"{k} {tuple(v.shape)} where {tuple(state[k].shape)} is needed"
        for k, v in tensors.items()
        if k in state and v.shape != state[k].shape
    ]
    problems = [
        f"{label}: {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise SpecError(f"weights {source} must fit the factory's module exactly; {'; '.join(problems)}")
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)


def _import_factory(code: Path, path: str) -> Any:
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise SpecError(f"factory must read package.module:callable; got {path!r}")
    with _IMPORT_LOCK:
        imported = _import_from(code.resolve(), name, path)
    target: Any = imported
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise SpecError(f"factory {path!r}: module {name} has no {attribute!r}")
        target = getattr(target, part)
    return target


def _import_from(code: Path, name: str, path: str) -> ModuleType:
    """Imports with the model's own code first; another model's code of the same name is evicted."""
    for local in (*code.glob("*.py"), *(p.parent for p in code.glob("*/__init__.py"))):
        top = local.stem
        loaded = getattr(sys.modules.get(top), "__file__", None)
        if loaded and code not in Path(loaded).resolve().parents and "site-packages" not in loaded:
            for stale in [m for m in sys.modules if m == top or m.startswith(top + ".")]:
                del sys.modules[stale]
    if str(code) in sys.path:
        sys.path.remove(str(code))
    sys.path.insert(0, str(code))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(f"factory {path!r} cannot be imported: {error}") from error
    finally:  # stays importable for imports inside forward, but shadows nothing
        sys.path.remove(str(code))
        sys.path.append(str(code))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether training in bfloat16 pays: GPUs, and CPUs with instructions for it."""
    if device.type == "cuda":
        return True
    known = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class FeatureTap:
    """Reads one layer's value out of the forward pass of a module or of any twin of it.

    The hook sits on the layer itself, is found by name on every twin and writes to thread-local storage, only while
    `call` runs: forward passes of other threads, and plain ones, are not affected.

    Attributes:
        name: the layer's name; empty when the logits themselves are the embedding.
        before: True to read the layer's input, False for its output.
    """

    def __init__(self, name: str, before: bool) -> None:
        self.name = name
        self.before = before
        self._local = threading.local()
        local = self._local

        # Plain functions: copy.deepcopy of a module keeps them as they are, so twins carry the very same hook.
        def read_input(_: nn.Module, args: tuple[Any, ...]) -> None:
            if getattr(local, "active", False):
                local.value = args[0]

        def read_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if getattr(local, "active", False):
                local.value = output

        self._read_input, self._read_output = read_input, read_output

    def install(self, module: nn.Module) -> None:
        """Puts the hook on `module` if it is not there; do it before threads share the module."""
        if not self.name:
            return
        layer = module.get_submodule(self.name)
        hooks: Any = layer._forward_pre_hooks if self.before else layer._forward_hooks
        with _TAP_LOCK:
            if self.before and self._read_input not in hooks.values():
                layer.register_forward_pre_hook(self._read_input)
            elif not self.before and self._read_output not in hooks.values():
                layer.register_forward_hook(self._read_output)

    def call(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward pass.

        Args:
            module: the tapped module or a twin.
            x: (N, *shape), what forward receives.

        Returns:
            Logits (N, K) and the embedding (N, D); positions of a map or of a token sequence are averaged.
        """
        if not self.name:
            logits = module(x)
            return logits, logits
        self.install(module)
        self._local.active = True
        try:
            logits = module(x)
            value = self._local.value
        finally:
            self._local.active = False
            self._local.value = None
        return logits, pool(value)


def pool(value: torch.Tensor) -> torch.Tensor:
    """(N, D), (N, T, D) tokens or an (N, C, *space) map to (N, D)."""
    if value.ndim == 2:
        return value
    return value.mean(dim=1) if value.ndim == 3 else value.flatten(2).mean(dim=2)


def feature_tap(module: nn.Module, spec: ModelSpec, sample_input: np.ndarray | torch.Tensor) -> FeatureTap:
    """Chooses the embedding: the spec's `features`, else the input of the classifier, else the logits.

    Args:
        module: the base model, eval mode.
        spec: `features` and `num_classes` are read.
        sample_input: (N, *shape) with N >= 1, one forward pass is made on it.

    Raises:
        SpecError: `features` names no module, or one whose output is not a tensor with a row per instance.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    x = torch.as_tensor(sample_input).to(device)
    if spec.features:
        if spec.features not in dict(module.named_modules()):
            known = ", ".join(name for name, _ in module.named_children())
            raise SpecError(f"features must name a module; got {spec.features!r}, top-level modules: {known}")
        tap = FeatureTap(spec.features, before=False)
    else:
        tap = FeatureTap(_classifier_input(module, spec.num_classes, x), before=True)
    with torch.no_grad():
        try:
            embedding = tap.call(module, x)[1]
        except (AttributeError, TypeError) as error:
            raise SpecError(f"features {tap.name!r} must be a module that returns one tensor: {error}") from error
    if embedding.ndim != 2 or embedding.shape[0] != x.shape[0]:
        raise SpecError(f"features {tap.name!r} must give one row per instance; got {tuple(embedding.shape)}")
    return tap


def _classifier_input(module: nn.Module, num_classes: int, x: torch.Tensor) -> str:
    """Name of the last executed linear layer that gives one logit per class; empty if there is none."""
    names = {layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    executed: list[str] = []
    hooks = [layer.register_forward_pre_hook(lambda m, _: executed.append(names[m])) for layer in names]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    fitting = [name for name in executed if _linear(module, name).out_features == num_classes]
    return fitting[-1] if fitting else ""


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


@dataclass(frozen=True)
class InputMoments:
    """Per-instance statistics of raw inputs: means and squares (N, C), minimum and maximum (N), all float32."""

    means_NC: np.ndarray
    squares_NC: np.ndarray
    min_N: np.ndarray
    max_N: np.ndarray


def input_moments(inputs: np.ndarray, layout: str) -> InputMoments:
    """Per-instance channel moments of raw inputs.

    Args:
        inputs: (N, *shape) of any number type.
        layout: HWC (channels last), CHW (channels first) or F (every column is a channel).

    Returns:
        Moments over the positions of each channel; NaN where the inputs are NaN, minimum and maximum ignore NaN.
    """
    flat = inputs.reshape(len(inputs), 1, -1) if layout == "F" or inputs.ndim < 3 else inputs
    if layout == "CHW" and flat.ndim > 3:
        flat = np.moveaxis(flat, 1, -1)
    channels = flat.reshape(len(inputs), -1, flat.shape[-1]).astype(np.float32)
    return InputMoments(
        channels.mean(axis=1),
        np.square(channels).mean(axis=1),
        np.fmin.reduce(channels, axis=(1, 2)),
        np.fmax.reduce(channels, axis=(1, 2)),
    )


def batches(inputs: np.ndarray, device: torch.device, batch: int) -> Iterator[torch.Tensor]:
    """Rows of `inputs` in order, as tensors on `device`, at most `batch` at a time."""
    for start in range(0, len(inputs), batch):
        yield torch.from_numpy(np.array(inputs[start : start + batch])).to(device)  # a copy: data may be read-only


def collect_sample(
    module: nn.Module,
    tap: FeatureTap,
    inputs_np: np.ndarray,
    device: torch.device,
    batch: int = 256,
    labels: np.ndarray | None = None,
    layout: str = "HWC",
) -> Sample:
    """Everything a baseline is fitted on, from one pass over `inputs_np`.

    Args:
        module: base or twin, in eval mode, on `device`.
        tap: its feature tap.
        inputs_np: (N, *shape), N >= 1.
        device: where to run.
        batch: rows per forward pass.
        labels: int64 (N,), -1 where unknown; passed through.
        layout: the spec's input layout, for the channel statistics.
    """
    from orchestrator.drift.baseline import Sample

    moments = input_moments(inputs_np, layout)
    low_N, high_N = (torch.from_numpy(v).to(device) for v in (moments.min_N, moments.max_N))
    embeddings, logits, sketches = [], [], []
    with torch.inference_mode():
        for start, x in zip(range(0, len(inputs_np), batch), batches(inputs_np, device, batch), strict=True):
            logits_NK, embedding_ND = tap.call(module, x)
            rows = slice(start, start + batch)
            logits.append(logits_NK.float().cpu().numpy())
            embeddings.append(embedding_ND.float().cpu().numpy())
            sketches.append(image_sketch(x, layout, low_N[rows], high_N[rows]).cpu().numpy())
    return Sample(
        embedding_ND=np.concatenate(embeddings),
        logits_NK=np.concatenate(logits),
        channel_means_NC=moments.means_NC,
        channel_squares_NC=moments.squares_NC,
        input_min_N=moments.min_N,
        input_max_N=moments.max_N,
        labels_N=labels,
        sketch_NS=np.concatenate(sketches),
    )
