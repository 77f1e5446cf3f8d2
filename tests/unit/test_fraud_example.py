"""The fraud example's data is the published world: its figures are known in closed form."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fraud"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE))  # the script imports the model beside it
    spec = importlib.util.spec_from_file_location("fraud_make_data", EXAMPLE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLE))


def best_accuracy(rows, labels, feature):
    """Of the best single interval of one feature answered 'fraud', which holds the best rule: both are Gaussian."""
    value, counted = rows[:, feature], []
    edges = np.quantile(value, np.linspace(0.0, 1.0, 60))
    for i, low in enumerate(edges):
        counted += [(((value >= low) & (value <= high)) == labels).mean() for high in edges[i:]]
    return max(counted)


def test_the_published_drift_leaves_nothing_better_than_a_constant_answer(example):
    rows, labels = example.draw(200_000, np.random.default_rng(1), "drifted")
    assert 1.0 - labels.mean() == pytest.approx(0.85, abs=0.003)
    assert best_accuracy(rows, labels, example.FEATURE) == pytest.approx(0.85, abs=0.004)


def test_the_offset_leaves_classes_as_far_apart_as_they_were(example):
    best = [
        best_accuracy(*example.draw(200_000, np.random.default_rng(1), world), example.FEATURE)
        for world in ("clean", "offset")
    ]
    assert best[0] == pytest.approx(best[1], abs=0.002)
    assert best[0] > 0.93
