"""`heal demo` as a user runs it: a process of its own, with a Ray of its own, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from orchestrator.datasets import write_dataset

LIMIT_S = 420


@pytest.mark.timeout(LIMIT_S + 60)
def test_demo_heals_over_http_and_loses_and_mixes_no_request(tiny_model: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "clean.parquet", *tiny.make(800, seed=21))
    write_dataset(tmp_path / "drifted.parquet", *tiny.make(1600, seed=22, drift=True))
    write_dataset(tmp_path / "eval.parquet", *tiny.make(500, seed=23, drift=True))
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", "from orchestrator.cli.main import main; main()", "demo"]
    command += ["--model", str(tiny_model), "--report", str(report), "--requests", "700", "--timeout", "300"]
    for name in ("clean", "drifted", "eval"):
        command += [f"--{name}", str(tmp_path / f"{name}.parquet")]
    for setting in ("num_trials=3", "trial_epochs=1", "buffer_instances=600", "bake_s=2"):
        command += ["--set", setting]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found = json.loads(report.read_text())
    assert found["verdict"] == "healed"
    assert found["requests"]["failed"] == 0
    assert found["requests"]["mixed_generation"] == 0
    assert found["requests"]["sent"] >= 700
    assert found["accuracy"]["clean_before"] - found["accuracy"]["traffic_before"] > 0.1
    assert found["recovered"] > 0.3
    assert found["trials"]
    assert found["adapter"]["digest"]
