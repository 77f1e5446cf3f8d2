"""A drift that was healed before heals again without a training step; another drift does not."""

import numpy as np
import pytest
from conftest import write_traffic

import tiny
from orchestrator.keys import ServiceKeys
from orchestrator.messages import Placement, SearchRequest
from orchestrator.models import publish_model
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage
from tuning.inprocess import InProcessRunner
from tuning.prepare import prepare_base


@pytest.fixture(scope="module")
def healed(tmp_path_factory, tiny_model, make_request):
    """A storage whose registry holds the winner of one search, and a function that searches there again."""
    storage = open_storage(str(tmp_path_factory.mktemp("recall")))
    base = publish_model(storage, load_spec(tiny_model))
    prepare_base(storage, base, "cpu")

    def search(episode, inputs, labels, keys=None, **changes) -> tuple[SearchRequest, object]:
        for key in storage.list("traffic/"):
            storage.delete(key)
        write_traffic(storage, base, inputs, labels)
        request = make_request(episode, base=base, storage=storage.uri, **changes)
        runner = InProcessRunner(storage, keys)
        runner.launch(request)
        return request, runner.status(episode)

    _, first = search("first", *tiny.make(600, seed=50, drift=True))
    assert first.winner
    return search, first


def test_the_same_drift_again_is_healed_by_the_same_adapter_without_training(healed):
    search, first = healed
    _, again = search("again", *tiny.make(600, seed=51, drift=True))
    assert again.state == "finished"
    assert again.winner == first.winner
    assert [t.objective for t in again.trials] == ["recalled"]
    assert again.trials[0].epochs == 0
    assert again.winner_trial == again.trials[0].trial_id
    assert "seen before" in again.message


def test_another_drift_is_searched_for_anew(healed):
    search, first = healed
    inputs, labels = tiny.make(600, seed=52)
    other = np.clip(inputs.astype(int) // 3 + 150, 0, 255).astype(np.uint8)
    _, found = search("other", other, labels)
    assert found.winner != first.winner
    assert found.trials[0].config.placement is Placement.NORM_STATISTICS
    assert all(t.objective != "recalled" for t in found.trials)


def test_an_adapter_that_this_service_did_not_sign_is_not_recalled(healed):
    search, _ = healed
    keys = ServiceKeys("stripes", b"s" * 32, b"f" * 32, {})
    _, found = search("signed", *tiny.make(600, seed=53, drift=True), keys=keys)
    assert all(t.objective != "recalled" for t in found.trials)
