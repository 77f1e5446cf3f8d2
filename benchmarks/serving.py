"""Requests per second of the monitored service over plain Ray Serve with the same model, in interleaved rounds.

    python -m benchmarks.serving [--rounds 20] [--requests 200] [--connections 16] [--model SPEC]

Both speak the binary tensor protocol's body size: the plain one takes the same raw bytes and returns JSON, batched by
`@serve.batch`. Prints the ratio per round's pair, its median and a bootstrap interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROWS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--model", type=Path, default=None, help="model spec; default: the embedded digits model")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="heal-bench-") as folder:
        plain, ours, name, shape = _start(args.model, folder)
        body, headers = _body(shape)
        urls = {
            "plain": (
                plain,
                np.zeros((ROWS, *shape), np.uint8).tobytes(),
                {"Content-Type": "application/octet-stream"},
            ),
            "ours": (f"{ours}/v2/models/{name}/infer", body, headers),
        }
        asyncio.run(_rounds(urls, args))


def _start(model: Path | None, folder: str) -> tuple[str, str, str, tuple[int, ...]]:
    import ray
    from ray import serve

    from benchmarks.plain_app import PlainServer
    from orchestrator.launch import AppArgs, _demo_model, app, free_port
    from orchestrator.registry import publish_model
    from orchestrator.spec import load_spec
    from orchestrator.storage import open_storage

    path = model or _demo_model()
    spec = load_spec(path)
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    base = publish_model(open_storage(folder), spec)
    serve.run(PlainServer.bind(folder, base), name="plain", route_prefix="/plain")
    serve.run(
        app(AppArgs(model=str(path), storage=folder, replicas=1, mode="observe", service="bench")),
        name="ours",
        route_prefix="/ours",
    )
    root = f"http://127.0.0.1:{port}"
    return f"{root}/plain/infer", f"{root}/ours", spec.name, spec.input_shape


def _body(shape: tuple[int, ...]) -> tuple[bytes, dict[str, str]]:
    raw = np.zeros((ROWS, *shape), np.uint8).tobytes()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "input",
                    "shape": [ROWS, *shape],
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": len(raw)},
                }
            ],
            "outputs": [{"name": "logits"}],
        }
    ).encode()
    return header + raw, {
        "Inference-Header-Content-Length": str(len(header)),
        "Content-Type": "application/octet-stream",
    }


async def _rounds(urls: dict[str, Any], args: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {name: [] for name in urls}
    limits = httpx.Limits(max_connections=args.connections)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        for name in urls:
            await _round(client, urls[name], args.requests, args.connections)  # warm
        for number in range(args.rounds):
            order = ("plain", "ours") if number % 2 else ("ours", "plain")
            for name in order:
                rates[name].append(await _round(client, urls[name], args.requests, args.connections))
    ratios = np.array(rates["ours"]) / np.array(rates["plain"])
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(ratios, len(ratios))) for _ in range(5000)]
    low, high = np.percentile(medians, [2.5, 97.5])
    print(f"plain Serve  {np.median(rates['plain']):8.1f} requests/s (median of {args.rounds})")
    print(f"ours         {np.median(rates['ours']):8.1f} requests/s")
    print(f"ours/plain   {np.median(ratios):8.3f}  95% interval [{low:.3f}, {high:.3f}]")
    print(
        f"machine: {os.cpu_count()} cores; {args.connections} connections, {args.requests} requests a round, {ROWS} row"
    )


async def _round(client: httpx.AsyncClient, target: tuple[str, bytes, dict[str, str]], total: int, width: int) -> float:
    url, body, headers = target
    left = iter(range(total))

    async def worker() -> None:
        for _ in left:
            reply = await client.post(url, content=body, headers=headers)
            reply.raise_for_status()

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(width)))
    return total / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
