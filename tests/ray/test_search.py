"""A search under real Ray and Tune: it finds a winner, outlives its orchestrator, and its own actor's death is seen."""

import os
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import tiny
from orchestrator.messages import Kind, Placement, SearchRequest
from orchestrator.models import publish_model
from orchestrator.registry import load_adapter
from orchestrator.settings import NAMESPACE
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage
from tuning.records import encode
from tuning.search import RayTrialRunner

TIMEOUT_S = 240.0


@pytest.fixture(scope="module", autouse=True)
def cpu_cluster():
    """A Ray of two CPUs; another test's, where one runs already."""
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="heal-", dir="/tmp"),
        runtime_env={"env_vars": {"HEAL_HOME": os.environ["HEAL_HOME"], "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def world(tmp_path_factory, tiny_model):
    """Storage with a published base and 700 drifted instances; its own for each test: no adapter is known yet."""
    storage = open_storage(str(tmp_path_factory.mktemp("storage")))
    base = publish_model(storage, load_spec(tiny_model))
    inputs, _ = tiny.make(700, seed=50, drift=True)
    n = len(inputs)
    table = pa.table(
        {
            "id": [f"i{i}" for i in range(n)],
            "time_s": 1000.0 + np.arange(n),
            "segment": ["all"] * n,
            "digest": ["base"] * n,
            "generation": [0] * n,
            "prediction": np.arange(n) % 4,
            "confidence": np.ones(n, np.float32),
            "input": pa.FixedShapeTensorArray.from_numpy_ndarray(inputs),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.put(f"traffic/base={base}/date=1970-01-01/r-0.parquet", sink.getvalue().to_pybytes())
    return storage, base


def request(world, episode, **changes):
    storage, base = world
    values = {
        "episode": episode,
        "base": base,
        "storage": storage.uri,
        "since_s": 0.0,
        "until_s": 1e9,
        "max_instances": 2000,
        "labels": "none",
        "kind": Kind.COVARIATE_HARMFUL,
        "seed": 0,
        "budget_s": 120.0,
        "num_trials": 3,
        "epochs": 2,
        "trial_device": "auto",
    }
    return SearchRequest(**{**values, **changes})


def wait(read, what):
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        value = read()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {TIMEOUT_S} s for {what}")


def ended(runner, episode):
    status = runner.status(episode)
    return status if status.state in ("finished", "failed") else None


def test_a_search_finds_a_winner_that_the_gate_can_measure(world):
    storage, base = world
    runner = RayTrialRunner("stripes", storage)
    ask = request(world, "e1")
    assert runner.status("e1").state == "absent"
    runner.launch(ask)
    start = time.monotonic()
    assert runner.status("e1").state == "running"
    assert time.monotonic() - start < 2
    runner.launch(ask)  # again: nothing happens
    successor = RayTrialRunner("stripes", storage)  # an orchestrator after a crash
    status = wait(lambda: ended(successor, "e1"), "the search")
    assert status.state == "finished", status.message
    assert status.trials[0].config.placement is Placement.NORM_STATISTICS
    assert len(status.trials) == 3
    assert all(t.status in ("finished", "stopped") for t in status.trials), status.trials
    assert status.buffered == 700
    assert status.winner is not None, status.message
    assert status.search_s >= status.train_s > 0
    config, tensors, manifest = load_adapter(storage, status.winner)
    assert config["peft_type"] == "LORA"
    assert tensors
    assert manifest["base"] == base

    runner.measure(ask, status.winner)
    runner.measure(ask, status.winner)
    evidence = wait(lambda: runner.evidence("e1", status.winner), "the evidence")
    assert evidence.error == ""
    assert evidence.shift_candidate < evidence.shift_base
    assert evidence.reference_share < 0.3
    assert encode(RayTrialRunner("stripes", storage).status("e1")) == encode(runner.status("e1"))


def test_a_killed_search_actor_goes_on_from_its_records(world):
    runner = RayTrialRunner("stripes", world[0])
    runner.launch(request(world, "e2"))
    wait(lambda: runner.status("e2").trials, "a first trial")
    ray.kill(ray.get_actor("heal-search-stripes-e2", NAMESPACE), no_restart=False)
    status = wait(lambda: ended(runner, "e2"), "the restarted search")
    assert status.state == "finished", status.message
    assert status.winner is not None


def test_a_search_whose_actor_is_gone_for_good_is_failed(world):
    runner = RayTrialRunner("stripes", world[0])
    runner.launch(request(world, "e3"))
    ray.kill(ray.get_actor("heal-search-stripes-e3", NAMESPACE), no_restart=True)
    status = wait(lambda: ended(runner, "e3"), "the failure to be seen")
    assert status.state == "failed"
    assert "died" in status.message


def test_a_cancelled_search_ends_without_a_winner(world):
    runner = RayTrialRunner("stripes", world[0])
    runner.launch(request(world, "e4", epochs=50))
    wait(lambda: runner.status("e4").trials, "a first trial")
    runner.cancel("e4")
    runner.cancel("e4")
    status = wait(lambda: ended(runner, "e4"), "the end")
    assert status.state == "failed"
    assert status.message == "cancelled"
    assert status.winner is None


def test_a_search_with_every_cpu_taken_still_ends(world):
    @ray.remote(num_cpus=2)
    class Serving:
        def ready(self):
            return True

    replica = Serving.remote()
    assert ray.get(replica.ready.remote())
    try:
        runner = RayTrialRunner("stripes", world[0])
        runner.launch(request(world, "e5", num_trials=1))
        status = wait(lambda: ended(runner, "e5"), "the search")
    finally:
        ray.kill(replica)
    assert status.state == "finished", status.message
    assert status.winner is not None


def test_too_little_traffic_fails_with_both_numbers(world):
    runner = RayTrialRunner("stripes", world[0])
    runner.launch(request(world, "e6", since_s=1e8))
    status = wait(lambda: ended(runner, "e6"), "the failure")
    assert status.state == "failed"
    assert "32" in status.message
    assert "got 0" in status.message
