"""The fraud example's data is the published world: its figures are known in closed form."""

import importlib.util
import json
import re
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


@pytest.fixture(scope="module")
def folder(example, tmp_path_factory):
    """What `make_data.py` writes."""
    out = tmp_path_factory.mktemp("fraud")
    sys.argv = ["make_data.py", str(out)]
    example.main()
    return out


def rehearse(folder, world):
    """The README's command, in this process."""
    from orchestrator.cli.main import run

    report = folder / f"{world}.json"
    files = ["--traffic", str(folder / f"{world}.parquet"), "--eval", str(folder / f"eval_{world}.parquet")]
    run(["rehearse", "--model", str(folder / "model.yaml"), *files, "--labels", "none", "--report", str(report)])
    return json.loads(report.read_text())


def test_the_published_drift_is_refused_and_the_ceiling_named(folder):
    report = rehearse(folder, "drifted")
    assert report["verdict"] == "refused"
    assert report["trials"] == []
    ceiling = float(re.search(r"the ceiling of any model is (0\.\d+)", report["reason"])[1])
    constant = float(re.search(r"always answering 'normal' is right in (0\.\d+)", report["reason"])[1])
    assert ceiling == pytest.approx(0.85, abs=0.025)
    assert constant == pytest.approx(0.85, abs=0.025)


def test_the_offset_is_healed_without_labels(folder):
    report = rehearse(folder, "offset")
    assert report["verdict"] == "healed", report["reason"]
    assert report["provisional"]
    assert report["recovered"] > 0.9
