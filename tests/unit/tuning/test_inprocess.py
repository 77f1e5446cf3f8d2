"""A whole search in one process: a registered winner, evidence for the gate, and nothing done twice."""

from dataclasses import replace

import pytest

from orchestrator.drift.baseline import load_baseline
from orchestrator.gate import decide
from orchestrator.messages import Analysis, Kind, Placement
from orchestrator.registry import load_adapter
from orchestrator.settings import HealSettings
from tuning.inprocess import InProcessRunner
from tuning.records import decode_request, encode, read_status


@pytest.fixture(scope="module")
def searched(world, make_request):
    seen = []
    runner = InProcessRunner(world[0], on_trial=seen.append)
    request = make_request("in-process")
    assert runner.status(request.episode).state == "absent"
    runner.launch(request)
    return runner, request, seen


def test_a_search_registers_a_winner_with_its_baseline(searched, world):
    runner, request, seen = searched
    status = runner.status(request.episode)
    assert status.state == "finished", status.message
    assert list(status.trials) == seen
    assert [t.config.placement for t in seen] == [Placement.NORM_STATISTICS, Placement.ALL]
    assert status.buffered == 600
    config, _, manifest = load_adapter(world[0], status.winner)
    assert config["peft_type"] == "LORA"
    assert manifest["base"] == request.base
    assert manifest["episode"] == request.episode
    assert manifest["data"]["parts"]["gate"] > 50
    baseline = load_baseline(world[0], status.winner, request.base)
    assert baseline.normal_count == 600
    assert baseline.accuracy > 0


def test_the_gate_accepts_the_winner_of_a_drift_that_statistics_heal(searched):
    runner, request, _ = searched
    digest = runner.status(request.episode).winner
    assert runner.evidence(request.episode, digest) is None
    runner.measure(request, digest)
    evidence = runner.evidence(request.episode, digest)
    assert evidence.error == ""
    assert evidence.instances > 50
    assert evidence.reference_share < 0.3
    assert evidence.shift_candidate < evidence.shift_base
    assert evidence.labelled == 0
    decision = decide(evidence, request.kind, HealSettings())
    assert decision.analysis is Analysis.SUCCESSFUL, decision.message
    assert decision.provisional


def test_a_second_launch_and_a_second_runner_find_the_same_outcome(searched, world):
    runner, request, seen = searched
    before = len(seen)
    runner.launch(request)
    other = InProcessRunner(world[0])
    other.launch(request)
    assert len(seen) == before
    assert encode(other.status(request.episode)) == encode(runner.status(request.episode))
    assert encode(read_status(world[0], request.episode)) == encode(runner.status(request.episode))


def test_too_little_traffic_fails_with_both_numbers(world, make_request):
    runner = InProcessRunner(world[0])
    runner.launch(make_request("empty", since_s=1e8))
    status = runner.status("empty")
    assert status.state == "failed"
    assert "32" in status.message
    assert "got 0" in status.message


def test_a_cancelled_search_does_not_start(world, make_request):
    runner = InProcessRunner(world[0])
    runner.cancel("never")
    runner.launch(make_request("never"))
    assert runner.status("never").state == "absent"


def test_an_unknown_candidate_is_an_error_in_the_evidence(world, make_request):
    runner = InProcessRunner(world[0])
    runner.measure(make_request("unknown"), "0" * 64)
    evidence = runner.evidence("unknown", "0" * 64)
    assert "NotFound" in evidence.error
    assert decide(evidence, Kind.COVARIATE_HARMFUL, HealSettings()).analysis is Analysis.ERROR


def test_a_request_survives_json(make_request):
    import json

    request = replace(make_request("json"), kind=Kind.CONCEPT)
    assert decode_request(json.loads(encode(request))) == request


def test_labelled_traffic_gives_labelled_evidence(world, make_request):
    runner = InProcessRunner(world[0])
    request = make_request("labelled-gate", labels="all", num_trials=1)
    runner.launch(request)
    digest = runner.status(request.episode).winner
    runner.measure(request, digest)
    evidence = runner.evidence(request.episode, digest)
    assert evidence.labelled == evidence.instances
    assert evidence.labelled_wins > evidence.labelled_losses
    assert not decide(evidence, request.kind, HealSettings()).provisional
