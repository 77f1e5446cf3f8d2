"""The model spec (contract 3.2): what a user writes about a model, checked once, at the door.

Called by everything that loads a base model: the launcher, `heal rehearse`, replicas and trials (through `models`).
Parses and checks; it builds no module and reads no tensor. Every message names field, expectation and value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.errors import SpecError

SPEC_VERSION = 1
DTYPES = {  # Open Inference Protocol name -> numpy
    "BOOL": np.dtype(np.bool_),
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("U", "") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}
LAYOUTS = {"HWC": 3, "CHW": 3, "HW": 2, "F": 1}  # name -> number of dimensions
_KEYS = (
    *("spec_version", "name", "task", "factory", "kwargs", "weights", "input", "classes", "reference"),
    *("metric", "features"),
)
_REQUIRED = ("factory", "input", "classes", "reference")
_INPUT_KEYS = ("shape", "dtype", "layout", "columns")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; its own readers refuse more


@dataclass(frozen=True)
class ModelSpec:
    """A checked model spec. Make one with `load_spec` or `parse_spec`.

    Attributes:
        factory: `package.module:callable` that returns the `torch.nn.Module`.
        input_shape: of one instance, without the batch dimension.
        input_dtype: Open Inference Protocol name: UINT8, FP32, ...
        classes: names, in the order of the logits; at least two.
        reference: labelled Parquet file, as written: a path beside the spec, an absolute one, or a URI.
        name: what the serving protocol calls the model.
        task: always `classification`.
        kwargs: passed to the factory; plain JSON values.
        weights: safetensors file, as written like `reference`; None: the factory brings its own.
        layout: HWC, CHW, HW or F; "" for a shape that has no name.
        columns: names of tabular features, one per input, or None.
        metric: `accuracy`, `balanced_accuracy`, `f1:<class>`, or `{"cost": {true class: {predicted class: cost}}}`, in
            which a mistake that is left out costs 1; what `orchestrator.metric` makes of it.
        features: name of the module whose output is the embedding, or None: chosen later.
        folder: where the spec was read from, None for one that was never a file. Not part of the spec's identity.
        spec_version: of this format.
    """

    factory: str
    input_shape: tuple[int, ...]
    input_dtype: str
    classes: tuple[str, ...]
    reference: str
    name: str = "model"
    task: str = "classification"
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    layout: str = ""
    columns: tuple[str, ...] | None = None
    metric: str | dict[str, Any] = "accuracy"
    features: str | None = None
    folder: Path | None = field(default=None, compare=False)
    spec_version: int = SPEC_VERSION

    @property
    def num_classes(self) -> int:
        """K, the width of the logits."""
        return len(self.classes)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the input."""
        return DTYPES[self.input_dtype]

    def locate(self, value: str) -> str:
        """Absolute path, or URI, behind `reference` or `weights` as written in the spec."""
        if "://" in value:
            return value
        return str(((self.folder or Path()) / Path(value).expanduser()).absolute())

    def to_dict(self) -> dict[str, Any]:
        """The spec as a YAML mapping with every key that is set; `parse_spec` reads it back. Without `folder`."""
        inputs: dict[str, Any] = {"shape": list(self.input_shape), "dtype": self.input_dtype}
        if self.layout:
            inputs["layout"] = self.layout
        if self.columns is not None:
            inputs["columns"] = list(self.columns)
        values = {key: getattr(self, key) for key in _KEYS if key not in ("input", "classes")}
        values |= {"input": inputs, "classes": list(self.classes)}
        return {key: values[key] for key in _KEYS if values[key] is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path | None = None) -> ModelSpec:
        """Same as `parse_spec`."""
        return parse_spec(values, folder)


def load_spec(path: str | Path) -> ModelSpec:
    """Read a spec file; its reference and weights must be there.

    Raises:
        SpecError: the file is missing or no YAML mapping, a field is wrong, or a file that it names is missing.
    """
    file = Path(path).expanduser().absolute()
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the model spec must be a readable YAML file; {file}: {error}; check the path") from error
    except yaml.YAMLError as error:
        raise SpecError(f"the model spec must be valid YAML; {file}: {error}") from error
    spec = parse_spec(values, file.parent)
    for name, value in (("reference", spec.reference), ("weights", spec.weights)):
        if value and "://" not in value and not Path(spec.locate(value)).is_file():
            raise SpecError(f"{name} must be an existing file; got {value!r}, and {spec.locate(value)} does not exist")
    return spec


def parse_spec(values: Mapping[str, Any], folder: Path | None = None) -> ModelSpec:
    """Spec from a mapping as in contract 3.2.

    Args:
        values: keys of the spec; all have defaults but factory, input, classes and reference.
        folder: what relative paths are relative to.

    Raises:
        SpecError: an unknown or missing key, or a value out of its range. Where the weights file is at hand, it must
            also look like safetensors inside; files that are absent are not an error here.
    """
    _check_keys("the model spec", values, _KEYS)
    for key in _REQUIRED:
        if values.get(key) is None:
            raise SpecError(f"{key} is required in the model spec; it is missing; needed are {', '.join(_REQUIRED)}")
    version, task = values.get("spec_version", SPEC_VERSION), values.get("task", "classification")
    if version != SPEC_VERSION or isinstance(version, bool):
        raise SpecError(f"spec_version must be {SPEC_VERSION}; got {version!r}; install the release that knows it")
    if task != "classification":
        raise SpecError(f"task must be classification, the only one so far; got {task!r}")
    shape, dtype, layout, columns = _input(values["input"])
    classes = _classes(values["classes"])
    spec = ModelSpec(
        factory=_matching("factory", values["factory"], _FACTORY, "package.module:callable"),
        input_shape=shape,
        input_dtype=dtype,
        classes=classes,
        reference=_text("reference", values["reference"]),
        name=_name(values.get("name"), folder),
        kwargs=_kwargs(values.get("kwargs")),
        weights=None if values.get("weights") is None else _text("weights", values["weights"]),
        layout=layout,
        columns=columns,
        metric=_metric(values.get("metric"), classes),
        features=None if values.get("features") is None else _text("features", values["features"]),
        folder=folder,
    )
    if spec.weights is not None:
        _check_weights(spec.weights, spec.locate(spec.weights))
    return spec


def check_safetensors(name: str, head: bytes, num_bytes: int) -> None:
    """Refuse what is no safetensors file, by its first bytes: a pickle runs code when it is loaded.

    Args:
        name: of the file, for the message.
        head: its first bytes, at least 9 of them where there are so many.
        num_bytes: its whole size.

    Raises:
        SpecError: it is something else, or cut short.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8) or head[8:9] != b"{":
        kind = "a zip or pickle (torch.save)" if head[:2] == b"PK" or head[:1] == b"\x80" else "something else or cut"
        raise SpecError(
            f"weights must be safetensors; {name} holds {kind}; convert it with safetensors.torch.save_file"
        )


def _check_weights(value: str, location: str) -> None:
    if not value.endswith(".safetensors"):
        raise SpecError(
            f"weights must be a .safetensors file: a pickle (.pt, .pth, .bin) runs code when loaded; got {value!r}; "
            "convert it with safetensors.torch.save_file"
        )
    path = Path(location)
    if "://" not in location and path.is_file():
        with path.open("rb") as file:
            check_safetensors(value, file.read(9), path.stat().st_size)


def _check_keys(where: str, values: Any, known: tuple[str, ...]) -> None:
    if not isinstance(values, Mapping):
        raise SpecError(f"{where} must be a mapping of {', '.join(known)}; got {type(values).__name__}")
    for key in values:
        if key not in known:
            raise SpecError(f"unknown key {key!r} in {where}; known keys: {', '.join(known)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise SpecError(f"{name} must be a non-empty text; got {value!r}")
    return value


def _matching(name: str, value: Any, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise SpecError(f"{name} must read {expected}; got {value!r}")
    return value


def _name(value: Any, folder: Path | None) -> str:
    if value is None:
        return folder.name if folder is not None and _NAME.fullmatch(folder.name) else "model"
    return _matching("name", value, _NAME, "letters, digits, '.', '_', '-' (it is part of a URL)")


def _kwargs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"kwargs must map argument names to values; got {value!r}")
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return dict(value)
    except (TypeError, ValueError) as error:
        raise SpecError(f"kwargs must be plain numbers, texts, lists and mappings; {error}") from error
    raise SpecError(f"kwargs must be plain values with texts as keys; got {value!r}")


def _input(value: Any) -> tuple[tuple[int, ...], str, str, tuple[str, ...] | None]:
    _check_keys("input", value, _INPUT_KEYS)
    shape, dtype = value.get("shape"), value.get("dtype")
    whole = isinstance(shape, list | tuple) and all(type(n) is int and n >= 1 for n in shape)
    if not whole or not shape:
        raise SpecError(f"input.shape must list the sizes (>= 1) of one instance, without the batch; got {shape!r}")
    if dtype not in DTYPES:
        raise SpecError(f"input.dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    layout = value.get("layout", _default_layout(tuple(shape)))
    if layout and LAYOUTS.get(layout) != len(shape):
        fitting = [name for name, dimensions in LAYOUTS.items() if dimensions == len(shape)]
        raise SpecError(
            f"input.layout must be one of {', '.join(fitting) or 'none'} for shape {list(shape)}; got {layout!r}"
        )
    columns = value.get("columns")
    if columns is not None:
        columns = _unique_texts("input.columns", columns)
        if layout != "F" or len(columns) != shape[0]:
            raise SpecError(
                f"input.columns must name each of the inputs of a 1-d shape {list(shape)}; got {len(columns)}"
            )
    return tuple(shape), dtype, layout, columns


def _default_layout(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "HWC" if shape[-1] in (1, 3, 4) or shape[0] not in (1, 3, 4) else "CHW"
    return {1: "F", 2: "HW"}.get(len(shape), "")


def _classes(value: Any) -> tuple[str, ...]:
    if isinstance(value, list | tuple):
        value = [str(name) if type(name) is int else name for name in value]
    names = _unique_texts("classes", value)
    if len(names) < 2:
        raise SpecError(f"classes must name at least two; got {list(names)}")
    return names


def _unique_texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise SpecError(f"{name} must be a list of names; got {value!r}")
    for item in value:
        if not isinstance(item, str) or not item or not item.isprintable():
            raise SpecError(f"{name} must be printable texts; got {item!r}; put it in quotes")
    doubled = sorted({item for item in value if value.count(item) > 1})
    if doubled:
        raise SpecError(f"{name} must be unique; {', '.join(doubled)} stands there twice")
    return tuple(value)


def _metric(value: Any, classes: tuple[str, ...]) -> str | dict[str, Any]:
    if value is None or value in ("accuracy", "balanced_accuracy"):
        return value or "accuracy"
    if isinstance(value, str) and value.startswith("f1:") and value[3:] in classes:
        return value
    if isinstance(value, Mapping) and set(value) == {"cost"} and isinstance(value["cost"], Mapping):
        return {"cost": {_one_of(true, classes): _costs(row, classes) for true, row in value["cost"].items()}}
    raise SpecError(f"metric must be accuracy, balanced_accuracy, f1:<class> or cost: {{...}}; got {value!r}")


def _costs(row: Any, classes: tuple[str, ...]) -> dict[str, float]:
    if not isinstance(row, Mapping) or not all(type(cost) in (int, float) for cost in row.values()):
        raise SpecError(f"metric.cost must map true class to predicted class to a number; got {row!r}")
    return {_one_of(predicted, classes): float(cost) for predicted, cost in row.items()}


def _one_of(name: Any, classes: tuple[str, ...]) -> str:
    text = str(name)
    if text not in classes:
        raise SpecError(f"metric.cost must use the names in classes; got {name!r}")
    return text
