"""Requests per second of the monitored service over plain Ray Serve with the same model, in interleaved rounds.

    python -m benchmarks.serving [--rounds 24] [--requests 200] [--connections 16] [--model SPEC]

The model is the CIFAR-10 ResNet-18 of the drift data beside the checkout when that is there, else the digits model; the
images are its reference's. The plain service takes the same raw bytes and returns the logits as JSON, batched by
`@serve.batch`. Rounds go plain, ours, ours, plain, ...; they begin when the drift baseline is there, so that every
instance is reduced and logged. Prints the rates, the median ratio of neighbouring rounds and its bootstrap interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROWS = 1
IMAGES = 1024  # different ones, so that the service does not take them for a stuck camera
RESNET = Path(__file__).resolve().parents[2] / "shared" / "data" / "model.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--model", type=Path, default=RESNET if RESNET.exists() else None, help="model spec")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="heal-bench-") as folder:
        plain, ours, name, inputs = _start(args.model, folder)
        raws = [inputs[i : i + ROWS].tobytes() for i in range(0, len(inputs), ROWS)]
        targets = {
            "plain": (plain, raws, {"Content-Type": "application/octet-stream"}),
            "ours": (f"{ours}/v2/models/{name}/infer", *_bodies(raws, inputs)),
        }
        asyncio.run(_rounds(targets, args))
        _stop()


def _start(model: Path | None, folder: str) -> tuple[str, str, str, np.ndarray]:
    import ray
    from ray import serve

    from benchmarks.plain_app import PlainServer
    from orchestrator.datasets import read_dataset
    from orchestrator.keys import load_keys
    from orchestrator.launch import AppArgs, _demo_model, app, free_port
    from orchestrator.models import publish_model
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
    _await_monitoring(f"{root}/ours", load_keys("bench").tokens["viewer"])
    inputs = np.array(read_dataset(spec.locate(spec.reference), spec).inputs[:IMAGES])
    return f"{root}/plain/infer", f"{root}/ours", spec.name, inputs


def _await_monitoring(url: str, viewer: str) -> None:
    """Wait for the drift baseline: before it nothing is reduced."""
    pause = threading.Event()
    for _ in range(1200):
        reply = httpx.get(f"{url}/healing", headers={"Authorization": f"Bearer {viewer}"}, timeout=30)
        if reply.status_code == 200 and reply.json()["drift"]:
            pause.wait(2.0)  # a replica looks for it every 2 s at most
            return
        pause.wait(0.5)
    raise SystemExit("the service did not measure its drift baseline within 10 minutes")


def _stop() -> None:
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def _bodies(raws: list[bytes], inputs: np.ndarray) -> tuple[list[bytes], dict[str, str]]:
    tensor = {
        "name": "input",
        "shape": [ROWS, *inputs.shape[1:]],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raws[0])},
    }
    header = json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode()
    return [header + raw for raw in raws], {
        "Inference-Header-Content-Length": str(len(header)),
        "Content-Type": "application/octet-stream",
    }


async def _rounds(targets: dict[str, Any], args: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {name: [] for name in targets}
    limits = httpx.Limits(max_connections=args.connections)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        for name in targets:
            await _round(client, targets[name], args.requests, args.connections)  # warm
        for number in range(args.rounds):
            order = ("plain", "ours") if number % 2 else ("ours", "plain")
            for name in order:
                rates[name].append(await _round(client, targets[name], args.requests, args.connections))
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


async def _round(
    client: httpx.AsyncClient, target: tuple[str, list[bytes], dict[str, str]], total: int, width: int
) -> float:
    url, bodies, headers = target
    left = iter(range(total))

    async def worker() -> None:
        for number in left:
            reply = await client.post(url, content=bodies[number % len(bodies)], headers=headers)
            reply.raise_for_status()

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(width)))
    return total / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
