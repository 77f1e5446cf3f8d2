"""Which changes stand for which kind, and what may truly be said about each."""

from __future__ import annotations

from benchmarks.cifar10 import DRIFTS
from benchmarks.diagnosis import drifts, faults

UNDER = ("", " on fog", " on gaussian_noise")  # what a broken pipeline is looked for under
BLENDS = (100, 50, 25)  # percent of a shared set's pixels
FAINT = (3, 6, 12)
BROKEN = tuple(f"{name}{under}" for name in faults.NAMED for under in UNDER)
NATURAL = (
    *(f"{name}@{percent}" if percent < 100 else name for name in DRIFTS for percent in BLENDS),
    *drifts.DEVELOPED,
)
GENTLE = (*(f"{name}@{percent}" for name in DRIFTS for percent in FAINT), *drifts.GENTLE)
HELD_OUT_DRIFTS = tuple(drifts.HELD_OUT)
UNSEEN = tuple(faults.DEVELOPED)
HELD_OUT_FAULTS = tuple(faults.HELD_OUT)
