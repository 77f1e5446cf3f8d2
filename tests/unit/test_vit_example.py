"""The vision transformer example heals without labels: the README's commands, with one trial."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from orchestrator.cli.main import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "vit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `make_data.py` writes."""
    sys.path.insert(0, str(EXAMPLE))  # the script imports the model beside it
    spec = importlib.util.spec_from_file_location("vit_make_data", EXAMPLE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("vit")
    sys.argv = ["make_data.py", str(out)]
    module.main()
    yield out
    sys.path.remove(str(EXAMPLE))


def test_a_transformer_is_healed_without_labels(folder):
    files = ["--traffic", str(folder / "dark.parquet"), "--eval", str(folder / "eval_dark.parquet")]
    report_file = folder / "report.json"
    options = ["--labels", "none", "--set", "num_trials=1", "--report", str(report_file)]
    assert run(["rehearse", "--model", str(folder / "model.yaml"), *files, *options]) == 0
    report = json.loads(report_file.read_text())
    assert report["verdict"] == "healed", report["reason"]
    assert report["adapter"]["objective"] == "restyled"
    assert report["recovered"] > 0.3
