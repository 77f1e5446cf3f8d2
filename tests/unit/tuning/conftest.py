"""A published tiny model with drifted traffic on a storage, and a search request that finds it."""

import pytest
from stored_traffic import write_traffic

import tiny
from orchestrator.messages import Kind, SearchRequest
from orchestrator.models import publish_model
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage
from tuning.prepare import prepare_base
from tuning.workbench import load_workbench


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_model):
    """Storage and base digest; 600 drifted instances are stored as traffic."""
    storage = open_storage(str(tmp_path_factory.mktemp("storage")))
    base = publish_model(storage, load_spec(tiny_model))
    write_traffic(storage, base, *tiny.make(600, seed=50, drift=True))
    prepare_base(storage, base, "cpu")
    return storage, base


@pytest.fixture(scope="session")
def make_request(world):
    """A function that makes search requests on that world."""

    def make(episode="e", **changes):
        values = {
            "episode": episode,
            "base": world[1],
            "storage": world[0].uri,
            "since_s": 0.0,
            "until_s": 1e9,
            "max_instances": 2000,
            "labels": "none",
            "kind": Kind.COVARIATE_HARMFUL,
            "seed": 0,
            "budget_s": 100.0,
            "num_trials": 2,
            "epochs": 2,
            "trial_device": "cpu",
        }
        return SearchRequest(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def bench(world, make_request):
    """The label-free workbench of that world."""
    return load_workbench(world[0], make_request("bench"), keep=False)


@pytest.fixture(scope="session")
def labelled_bench(world, make_request):
    """The workbench with every label."""
    return load_workbench(world[0], make_request("labelled", labels="all"), keep=False)


@pytest.fixture(scope="session")
def drifted():
    """Fresh drifted images and labels, for scoring only."""
    return tiny.make(600, seed=77, drift=True)
