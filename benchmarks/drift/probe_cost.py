"""What monitoring costs a replica: the probe's time beside the model's forward pass, and the bytes of a report.

Rounds are interleaved, so that a busy machine slows both; a round is one forward of 32 instances and, timed apart, one
reduction of the same 32.
"""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import numpy as np

from benchmarks.drift.features import Features
from benchmarks.drift.intervals import ratio_interval
from orchestrator.messages import Report
from orchestrator.settings import WINDOW_INSTANCES

TARGET_RATIO = 0.005
REPORT_LIMIT, PLAIN_LIMIT, SEGMENT_LIMIT = 16 * 1024, 4 * 1024, 1024
OBSERVES = 5  # reductions timed together: one is short beside the clock


def measure_cost(data: Path, features: Features, rounds: int, device_name: str) -> None:
    """Ratio of `Probe.observe` to the forward pass, median and interval over rounds."""
    import torch

    from orchestrator.datasets import read_dataset
    from orchestrator.spec import load_spec
    from serve_app.probe import Probe
    from tuning.base_model import build_module, feature_tap

    torch.set_num_threads(1)
    spec, device = load_spec(data / "model.yaml"), torch.device(device_name)
    module = build_module(data, spec).to(device)
    inputs = np.array(read_dataset(data / "clean.eval.parquet").inputs[: WINDOW_INSTANCES * 8])
    tap = feature_tap(module, spec, inputs[:2])
    probe = Probe(features.baseline, spec.layout, device)
    forwards, observes = [], []

    def clock_s() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        for number in range(rounds + 5):
            first = number % 8 * WINDOW_INSTANCES
            batch = torch.from_numpy(inputs[first : first + WINDOW_INSTANCES]).to(device)
            start_s = clock_s()
            logits, embedding = tap.call(module, batch)
            middle_s = clock_s()
            for _ in range(OBSERVES):
                probe.observe(batch, embedding, logits)
            end_s = clock_s()
            if number >= 5:  # the first ones warm up
                forwards.append(middle_s - start_s)
                observes.append((end_s - middle_s) / OBSERVES)
    ratio, low, high = ratio_interval(observes, forwards)
    micros = [1e6 / WINDOW_INSTANCES * float(np.median(times)) for times in (observes, forwards)]
    print(f"probe on {device_name}: {micros[0]:.2f} us an instance, forward {micros[1]:.1f} us")
    print(f"  ratio {ratio:.3%}, 95% interval [{low:.3%}, {high:.3%}], {rounds} rounds (target <= {TARGET_RATIO:.1%})")


def measure_bytes(data: Path, features: Features) -> None:
    """Pickled size of a heartbeat's report, by number of windows, and what a segment adds."""
    import torch

    from orchestrator.datasets import read_dataset
    from orchestrator.spec import load_spec
    from serve_app.forward import Pass
    from serve_app.probe import Probe
    from serve_app.windows import Windows
    from tuning.base_model import build_module, feature_tap

    spec = load_spec(data / "model.yaml")
    module = build_module(data, spec)
    inputs = torch.from_numpy(np.array(read_dataset(data / "clean.eval.parquet").inputs[:WINDOW_INSTANCES]))
    tap = feature_tap(module, spec, inputs[:2])
    logits, embedding = tap.call(module, inputs)
    done = Pass(inputs, logits.detach(), embedding.detach())
    probe = Probe(features.baseline, spec.layout, torch.device("cpu"))

    def size(segments: list[str], num_windows: int) -> int:
        windows = Windows("b" * 64, collect=lambda sums: np.asarray(sums.numpy()))
        for segment in segments:
            for _ in range(num_windows):
                windows.add(
                    "base", segment, WINDOW_INSTANCES, 0.0, probe.observe(done.inputs, done.embedding, done.logits)
                )
        report = Report("deployment#replica-0", "i" * 32, 12345, "b" * 64, 1, "base", ("base",), windows.take(2.0))
        return len(pickle.dumps(report, protocol=5))

    empty, plain = size([], 1), size([""], 1)
    many = size([f"s{i}" for i in range(32)], 1)
    print(f"report: {empty} bytes empty, {plain:,} with one window (target <= {PLAIN_LIMIT:,} without covariance)")
    print(f"  8 windows of one heartbeat: {size([''], 8):,} (target <= {REPORT_LIMIT:,})")
    each = (many - plain) / 31
    print(f"  32 segments: {many:,}; {each:,.0f} more a segment (target <= {SEGMENT_LIMIT:,})")
