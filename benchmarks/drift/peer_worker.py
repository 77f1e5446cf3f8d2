"""Runs one peer detector over streams in its own environment; started by `peers` as a script, imports only the peer.

    python peer_worker.py PEER WINDOW INPUT.npz OUTPUT.npz [--threshold X] [--series]

INPUT: `rows_NX`, all feature rows; `references` (R, 2), first and last + 1 row of each reference; per stream
`stream_T` of `index_ST` (row numbers, -1 beyond its end), `reference_S` and `onset_S` (-1: clean throughout).
OUTPUT: `series_ST` (statistic after each instance) with --series; else `alarms_S` (before the onset, or in all of a
clean stream) and `delay_S` (instances since the onset, -1: missed); always `cpu_s` and `instances` of the updates.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import deque
from functools import partial
from typing import Any

import numpy as np

PAST_WINDOWS = 2  # windows of clean instances before the onset that a windowed detector is shown
UNUSED_ERT, UNUSED_BOOTSTRAPS = 64.0, 500  # the peers' own thresholds are not used: one is tuned for all


class _Alibi:
    """alibi-detect's online MMD or LSDD: a window that slides by one instance."""

    def __init__(self, peer: str, reference: np.ndarray, window: int) -> None:
        import torch
        from alibi_detect.cd import LSDDDriftOnline, MMDDriftOnline

        torch.set_num_threads(1)
        torch.manual_seed(0)
        kind = {"mmd": MMDDriftOnline, "lsdd": LSDDDriftOnline}[peer]
        settings: dict[str, Any] = {"backend": "pytorch", "n_bootstraps": UNUSED_BOOTSTRAPS, "verbose": False}
        self._detector = kind(reference, UNUSED_ERT, window, **settings)

    def update(self, x: np.ndarray) -> float:
        return float(self._detector.predict(x)["data"]["test_stat"])

    def reset(self) -> None:
        self._detector.reset_state()


class _Cvm:
    """alibi-detect's online Cramer-von-Mises test of each feature; the largest ratio to its own threshold."""

    def __init__(self, reference: np.ndarray, window: int) -> None:
        from alibi_detect.cd import CVMDriftOnline

        self._detector = CVMDriftOnline(
            reference.astype(np.float64), UNUSED_ERT, [window // 2, window], n_bootstraps=2_000, verbose=False
        )

    def update(self, x: np.ndarray) -> float:
        found = self._detector.predict(x.astype(np.float64))["data"]
        with np.errstate(invalid="ignore"):
            ratio = np.asarray(found["test_stat"], float) / np.asarray(found["threshold"], float).reshape(-1, 1)
        return float(np.nanmax(ratio)) if np.isfinite(ratio).any() else np.nan

    def reset(self) -> None:
        self._detector.reset_state()


class _Frouros:
    """frouros' streaming MMD, Gaussian kernel as wide as the median distance."""

    def __init__(self, reference: np.ndarray, window: int) -> None:
        from frouros.detectors.data_drift import MMDStreaming
        from frouros.utils.kernels import rbf_kernel

        pairs = np.random.default_rng(0).integers(0, len(reference), (2, 4096))
        sigma = float(np.median(np.linalg.norm(reference[pairs[0]] - reference[pairs[1]], axis=1))) / np.sqrt(2)
        self._make = lambda: MMDStreaming(window_size=window, kernel=partial(rbf_kernel, sigma=sigma))
        self._reference = reference
        self.reset()

    def update(self, x: np.ndarray) -> float:
        result = self._detector.update(value=x)[0]
        return np.nan if result is None else float(result.distance)

    def reset(self) -> None:
        self._detector = self._make()
        self._detector.fit(X=self._reference)


class _Ks:
    """Two-sample Kolmogorov-Smirnov per predicted probability (scipy): minus log of the smallest p-value."""

    def __init__(self, reference: np.ndarray, window: int) -> None:
        from scipy.stats import ks_2samp

        self._test, self._reference, self._window = ks_2samp, np.sort(reference, axis=0), window
        self.reset()

    def update(self, x: np.ndarray) -> float:
        self._rows.append(x)
        self._seen += 1
        if len(self._rows) < self._window or self._seen % 16:  # a test every 16 instances
            return np.nan
        rows = np.array(self._rows)
        ps = [self._test(self._reference[:, k], rows[:, k], method="asymp").pvalue for k in range(rows.shape[1])]
        return -float(np.log(max(min(ps), 1e-300)))

    def reset(self) -> None:
        self._rows: deque[np.ndarray] = deque(maxlen=self._window)
        self._seen = 0


class _Adwin:
    """river's ADWIN on one number; the threshold is minus the logarithm of its delta."""

    def __init__(self, threshold: float) -> None:
        from river.drift import ADWIN

        self._make = partial(ADWIN, delta=float(np.exp(-threshold)))
        self._threshold = threshold
        self.reset()

    def update(self, x: np.ndarray) -> float:
        self._detector.update(float(x[0]))
        return self._threshold + 1.0 if self._detector.drift_detected else -np.inf

    def reset(self) -> None:
        self._detector = self._make()


def make(peer: str, reference: np.ndarray, window: int, threshold: float) -> Any:
    """The peer's detector, fitted to a reference (N, X)."""
    if peer in ("mmd", "lsdd"):
        return _Alibi(peer, reference, window)
    others = {"cvm": _Cvm, "frouros": _Frouros, "ks": _Ks}
    return _Adwin(threshold) if peer == "adwin" else others[peer](reference, window)


def main() -> None:
    """Run all streams."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer")
    parser.add_argument("window", type=int)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--threshold", type=float, default=np.inf)
    parser.add_argument("--series", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    given = np.load(args.input)
    rows_NX, index_ST = np.ascontiguousarray(given["rows_NX"]), given["index_ST"]
    num, length = index_ST.shape
    series_ST = np.full((num, length), np.nan, np.float32) if args.series else np.zeros((0, 0))
    alarms_S, delay_S = np.zeros(num, np.int64), np.full(num, -1, np.int64)
    cpu_s, instances, fitted, detector = 0.0, 0, -1, None
    for s in range(num):
        if fitted != given["reference_S"][s]:
            fitted = int(given["reference_S"][s])
            first, last = given["references"][fitted]
            detector = make(args.peer, rows_NX[first:last], args.window, args.threshold)
        detector.reset()
        onset = int(given["onset_S"][s])
        start = 0 if onset < 0 or args.peer == "adwin" else max(onset - PAST_WINDOWS * args.window, 0)
        for t in range(start, int((index_ST[s] >= 0).sum())):
            x = rows_NX[index_ST[s, t]]
            before_s = time.process_time()
            statistic = detector.update(x)
            cpu_s += time.process_time() - before_s
            instances += 1
            if args.series:
                series_ST[s, t] = statistic
            elif statistic > args.threshold:
                if 0 <= onset <= t:
                    delay_S[s] = t + 1 - onset
                    break
                alarms_S[s] += 1
                detector.reset()
    np.savez(args.output, series_ST=series_ST, alarms_S=alarms_S, delay_S=delay_S, cpu_s=cpu_s, instances=instances)


if __name__ == "__main__":
    main()
