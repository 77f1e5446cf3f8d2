"""What monitoring costs a replica: the probe's time beside the model's forward pass, and the bytes of a report.

Rounds are interleaved, so that a busy machine slows both; a round is forward passes of 32 instances and, timed apart,
reductions of as many rows together as a replica gathers. The baseline is fitted on part of the reference, seen through
the model here: what it was fitted on changes nothing about the cost.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drift.intervals import ratio_interval
from orchestrator.messages import Report
from orchestrator.settings import MAX_SEGMENTS, WINDOW_INSTANCES
from serve_app.observer import REDUCED_ROWS

TARGET_RATIO = 0.005
REPORT_LIMIT, PLAIN_LIMIT, SEGMENT_LIMIT = 16 * 1024, 4 * 1024, 1024  # bytes
OBSERVES = 5  # reductions timed together: one is short beside the clock
WARM_ROUNDS = 5
FIT_INSTANCES, BATCHES = 1_024, 8


class Served:
    """The model with its probe on one device, and a few batches of clean images."""

    def __init__(self, data: Path, device_name: str) -> None:
        import torch

        from orchestrator.datasets import read_dataset
        from orchestrator.drift.baseline import fit_baseline
        from orchestrator.spec import load_spec
        from serve_app.probe import Probe
        from tuning.base_model import build_module, collect_sample, feature_tap

        torch.set_num_threads(1)
        self.device = torch.device(device_name)
        spec = load_spec(data / "model.yaml")
        self._module = build_module(data, spec).to(self.device)
        reference = read_dataset(data / "reference.parquet")
        inputs, labels = np.array(reference.inputs[:FIT_INSTANCES]), reference.labels
        assert labels is not None
        self._tap = feature_tap(self._module, spec, inputs[:2])
        sample = collect_sample(
            self._module, self._tap, inputs, self.device, labels=labels[:FIT_INSTANCES], layout=spec.layout
        )
        baseline = fit_baseline("bench", "base", sample, None, None, sample.channel_means_NC.shape[1])
        self.probe = Probe(baseline, spec.layout, self.device)
        parts = np.split(inputs[: BATCHES * WINDOW_INSTANCES], BATCHES)
        self.batches = [torch.from_numpy(part).to(self.device) for part in parts]

    def forward(self, batch: Any) -> tuple[Any, Any]:
        """Logits and embedding."""
        return self._tap.call(self._module, batch)

    def clock_s(self) -> float:
        """Now, when the device has done what it was given."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def rounds(self, num: int) -> Iterator[tuple[float, float]]:
        """Seconds of a forward pass and of one reduction, per round."""
        import torch

        with torch.inference_mode():
            for number in range(num + WARM_ROUNDS):
                gathered = [self.batches[(number + i) % BATCHES] for i in range(REDUCED_ROWS // WINDOW_INSTANCES)]
                start_s = self.clock_s()
                parts = [self.forward(batch) for batch in gathered]
                middle_s = self.clock_s()
                logits, embedding = (torch.cat(column) for column in zip(*parts, strict=True))
                for _ in range(OBSERVES):
                    self.probe.observe(torch.cat(gathered), embedding, logits)
                end_s = self.clock_s()
                if number >= WARM_ROUNDS:
                    yield middle_s - start_s, (end_s - middle_s) / OBSERVES


def measure_cost(served: Served, rounds: int) -> None:
    """Ratio of `Probe.observe` to the forward pass, median and interval over rounds."""
    forwards, observes = zip(*served.rounds(rounds), strict=True)
    ratio, low, high = ratio_interval(observes, forwards)
    micros = [1e6 / REDUCED_ROWS * float(np.median(times)) for times in (observes, forwards)]
    print(f"probe on {served.device}: {micros[0]:.2f} us an instance, forward {micros[1]:.1f} us")
    print(f"  ratio {ratio:.3%}, 95% interval [{low:.3%}, {high:.3%}], {rounds} rounds (target <= {TARGET_RATIO:.1%})")


def measure_bytes(served: Served) -> None:
    """Pickled size of a heartbeat's report, by number of windows, and what a segment adds."""
    import torch

    from serve_app.windows import Windows

    def report_bytes(segments: list[str], num_windows: int) -> int:
        windows = Windows("b" * 64, collect=lambda sums: np.asarray(sums.cpu().numpy()))
        with torch.inference_mode():
            for segment in segments:
                for number in range(num_windows):
                    batch = served.batches[number % BATCHES]
                    logits, embedding = served.forward(batch)
                    windows.add("base", segment, WINDOW_INSTANCES, 0.0, served.probe.observe(batch, embedding, logits))
        report = Report("deployment#replica-0", "i" * 32, 12345, "b" * 64, 1, "base", ("base",), windows.take(2.0))
        return len(pickle.dumps(report, protocol=5))

    plain, several = report_bytes([""], 1), report_bytes([""], 8)
    many = report_bytes([f"s{i}" for i in range(MAX_SEGMENTS)], 1)
    print(f"report: {report_bytes([], 1)} bytes empty, {plain:,} with one window (target <= {PLAIN_LIMIT:,})")
    print(f"  8 windows of one heartbeat: {several:,} (target <= {REPORT_LIMIT:,})")
    each = (many - plain) / (MAX_SEGMENTS - 1)
    print(f"  {MAX_SEGMENTS} segments: {many:,}; {each:,.0f} more a segment (target <= {SEGMENT_LIMIT:,})")
