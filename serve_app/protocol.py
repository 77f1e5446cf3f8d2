"""Open Inference Protocol v2: request bytes in, arrays out, and back; JSON and the binary tensor extension.

Called by the ingress. Pure: no Ray, no torch, no HTTP framework. Every malformed request raises `RequestError` with a
message that names field, expectation and what came, and never an input's values.

Source: https://github.com/open-inference/open-inference-protocol; binary extension of KServe and Triton.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.errors import RequestError
from serve_app.tensors import DTYPES, describe, from_bytes, from_json, require_finite

INPUT_NAME = "input"
OUTPUTS = ("logits", "probabilities", "label")
MAX_ID = 128  # UTF-8 bytes of a request id: a feedback token holds 255 with what is added
MAX_SEGMENT = 64  # UTF-8 bytes of a segment name
HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Contract:
    """What requests to one model must look like.

    Args:
        model: name in the URL.
        shape: of one instance.
        datatype: protocol name, e.g. UINT8.
        num_classes: K.
        max_rows: largest first dimension of a request.
        max_body_bytes: largest body, after decompression.
    """

    model: str
    shape: tuple[int, ...]
    datatype: str
    num_classes: int
    max_rows: int = 4096
    max_body_bytes: int = 64 << 20

    def metadata(self, versions: tuple[str, ...]) -> dict[str, Any]:
        """What `GET /v2/models/{m}` answers."""
        shapes = {"logits": [-1, self.num_classes], "probabilities": [-1, self.num_classes], "label": [-1]}
        return {
            "name": self.model,
            "versions": list(versions),
            "platform": "pytorch_torch",
            "inputs": [{"name": INPUT_NAME, "datatype": self.datatype, "shape": [-1, *self.shape]}],
            "outputs": [{"name": n, "datatype": _datatype(n), "shape": shapes[n]} for n in OUTPUTS],
        }


@dataclass(frozen=True)
class InferRequest:
    """A parsed request: `inputs` (N, *shape), which outputs are wanted and which of them as binary."""

    inputs: np.ndarray
    id: str = ""
    segment: str = ""
    monitor: bool = True
    outputs: tuple[tuple[str, bool], ...] = tuple((name, False) for name in OUTPUTS)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Body of a request whose Content-Encoding is `encoding` (empty, identity, gzip or deflate).

    Raises:
        RequestError: 415 for another encoding, 413 above `limit` bytes, 400 for a broken stream.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise RequestError(f"Content-Encoding must be gzip, deflate or identity; got {_short(encoding)}", 415)
    inflater = zlib.decompressobj(31 if encoding == "gzip" else 15)
    try:
        data = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise RequestError(f"body must be a valid {encoding} stream; it is broken") from None
    if len(data) > limit:
        raise RequestError(f"body must be at most {limit} bytes after decompression; got more", 413)
    if not inflater.eof:
        raise RequestError(f"body must be a complete {encoding} stream; it ends early")
    return data


def load_json(raw: bytes | memoryview) -> dict[str, Any]:
    """A JSON object; RequestError for anything else."""
    try:
        value = json.loads(bytes(raw))
    except (ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON of sane depth"
        raise RequestError(f"body must be a JSON object; it cannot be parsed: {reason}") from None
    if not isinstance(value, dict):
        raise RequestError(f"body must be a JSON object; got {describe(value)}")
    return value


def parse(body: bytes, header_length: str | None, contract: Contract) -> InferRequest:
    """Parse an inference request.

    Args:
        body: the (decompressed) body: JSON, then the binary tensors if any.
        header_length: the header Inference-Header-Content-Length, None when absent: all of the body is JSON.
        contract: what the model takes.

    Raises:
        RequestError: the request breaks the protocol or does not fit the model.
    """
    view = memoryview(body)
    split = len(body) if header_length is None else _header_length(header_length, len(body))
    request = load_json(view[:split])
    tensor = _only_input(request)
    shape = _checked_shape(tensor, contract)
    values = _values(tensor, shape, contract.datatype, view[split:], header_length is not None)
    require_finite(values)
    parameters = _parameters(request, "request")
    return InferRequest(
        inputs=values,
        id=_text(request, "id", MAX_ID),
        segment=_text(parameters, "segment", MAX_SEGMENT),
        monitor=_flag(parameters, "monitor", True),
        outputs=_outputs(request, _flag(parameters, "binary_data_output", False)),
    )


def _header_length(value: str, available: int) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 12 and int(value) <= available):
        raise RequestError(f"{HEADER_LENGTH} must be an integer between 0 and {available}; got {_short(value)}")
    return int(value)


def _only_input(request: dict[str, Any]) -> dict[str, Any]:
    inputs = request.get("inputs")
    if not isinstance(inputs, list):
        raise RequestError(f"inputs must be a list of one tensor; got {describe(inputs)}")
    for tensor in inputs:
        if not isinstance(tensor, dict):
            raise RequestError(f"inputs must hold objects; got {describe(tensor)}")
        if tensor.get("name") != INPUT_NAME:
            raise RequestError(f"name of the input must be {INPUT_NAME!r}; got {_short(tensor.get('name'))}")
    if len(inputs) != 1:
        raise RequestError(f"inputs must hold the one tensor {INPUT_NAME!r}; got {len(inputs)} tensors")
    found: dict[str, Any] = inputs[0]
    return found


def _checked_shape(tensor: dict[str, Any], contract: Contract) -> tuple[int, ...]:
    if tensor.get("datatype") != contract.datatype:
        raise RequestError(f"datatype of input must be {contract.datatype}; got {_short(tensor.get('datatype'))}")
    shape = tensor.get("shape")
    wanted = ", ".join(["N", *map(str, contract.shape)])
    if not isinstance(shape, list) or any(type(n) is not int for n in shape):
        raise RequestError(f"shape of input must be [{wanted}]; got {_short(shape)}")
    if tuple(shape[1:]) != contract.shape or len(shape) != len(contract.shape) + 1:
        raise RequestError(f"shape of input must be [{wanted}]; got {_short(shape)}")
    if not 1 <= shape[0] <= contract.max_rows:
        raise RequestError(f"input must have 1 to {contract.max_rows} rows; got {_short(shape[0])}")
    return tuple(shape)


def _values(
    tensor: dict[str, Any], shape: tuple[int, ...], datatype: str, binary: memoryview, has_binary: bool
) -> np.ndarray:
    parameters = _parameters(tensor, "input")
    size = parameters.get("binary_data_size")
    for name in parameters:
        if name.startswith("shared_memory"):
            raise RequestError("input must carry its data in the request; shared memory is not supported")
    if size is None:
        if len(binary):
            raise RequestError(f"body must end after its JSON part; got {len(binary)} more bytes")
        if "data" not in tensor:
            raise RequestError("input must have data, or binary_data_size with a binary part; got neither")
        return from_json(tensor["data"], shape, datatype)
    if not has_binary:
        raise RequestError(f"{HEADER_LENGTH} must be given where binary_data_size is; it is absent")
    if "data" in tensor:
        raise RequestError("input must have data or binary_data_size; got both")
    if type(size) is not int or size != len(binary):
        raise RequestError(f"binary_data_size of input must be the {len(binary)} bytes that follow; got {_short(size)}")
    return from_bytes(binary, shape, datatype)


def _outputs(request: dict[str, Any], binary_default: bool) -> tuple[tuple[str, bool], ...]:
    wanted = request.get("outputs")
    if wanted is None or wanted == []:
        return tuple((name, binary_default) for name in OUTPUTS)
    if not isinstance(wanted, list):
        raise RequestError(f"outputs must be a list; got {describe(wanted)}")
    found: dict[str, bool] = {}
    for item in wanted:
        name = item.get("name") if isinstance(item, dict) else None
        if name not in OUTPUTS:
            raise RequestError(f"outputs must name {', '.join(OUTPUTS)}; got {_short(name)}")
        if name in found:
            raise RequestError(f"outputs must name each output once; got {name} twice")
        parameters = _parameters(item, "output")
        for option in ("classification", "shared_memory_region"):
            if parameters.get(option):
                raise RequestError(f"output parameter {option} is not supported; ask for {OUTPUTS[2]!r} instead")
        found[str(name)] = _flag(parameters, "binary_data", binary_default)
    return tuple(found.items())


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    value = holder.get("parameters", {})
    if not isinstance(value, dict):
        raise RequestError(f"parameters of the {where} must be an object; got {describe(value)}")
    return value


def _flag(holder: dict[str, Any], name: str, default: bool) -> bool:
    value = holder.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false; got {_short(value)}")
    return value


def _text(holder: dict[str, Any], name: str, limit: int) -> str:
    value = holder.get(name, "")
    # A lone surrogate has no UTF-8; it is not printable, so that is asked first.
    if not isinstance(value, str) or not (value == "" or value.isprintable()) or len(value.encode()) > limit:
        raise RequestError(f"{name} must be a printable string of at most {limit} bytes of UTF-8; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    """A client's word, cut: messages never carry inputs."""
    if isinstance(value, (list, dict)) and len(value) > 16:
        return f"{describe(value)} of length {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _datatype(output: str) -> str:
    return "INT64" if output == "label" else "FP32"


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Probabilities of float32 logits (N, K), float32."""
    shifted_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    return np.asarray(shifted_NK / shifted_NK.sum(axis=1, keepdims=True), dtype=np.float32)


def _output(name: str, logits_NK: np.ndarray) -> np.ndarray:
    """One of OUTPUTS: float32 (N, K), float32 (N, K) or int64 (N,)."""
    if name == "label":
        return np.asarray(logits_NK.argmax(axis=1), dtype=DTYPES["INT64"])
    return softmax(logits_NK) if name == "probabilities" else np.asarray(logits_NK, dtype=DTYPES["FP32"])


def render(
    request: InferRequest, model: str, version: str, request_id: str, parameters: dict[str, Any], logits: np.ndarray
) -> tuple[bytes, int | None]:
    """The reply's body.

    Args:
        request: which outputs, in which form.
        model: its name.
        version: digest that answered, or `base`.
        request_id: echoed.
        parameters: of the reply.
        logits: float32 (N, K).

    Returns:
        Body, and the length of its JSON part where binary tensors follow (the header to send), else None.

    Raises:
        RequestError: 500, the model gave NaN or infinity, which JSON cannot carry.
    """
    if not np.isfinite(logits).all():
        raise RequestError("the model gave logits that are not finite for this input", 500)
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in request.outputs:
        values = _output(name, logits)
        output: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": _datatype(name)}
        if binary:
            raw = values.tobytes()
            tail.append(raw)
            output["parameters"] = {"binary_data_size": len(raw)}
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    head = json.dumps(
        {
            "model_name": model,
            "model_version": version,
            "id": request_id,
            "parameters": parameters,
            "outputs": outputs,
        },
        separators=(",", ":"),
    ).encode()
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)
