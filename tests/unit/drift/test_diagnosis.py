"""Which kind of drift: broken inputs, one replica, class shares, harmless, harmful, nothing."""

from dataclasses import replace

import numpy as np
import pytest
from mixture import World, window

from orchestrator.drift.diagnosis import diagnose, diagnose_failures
from orchestrator.drift.statistics import merge
from orchestrator.messages import Alarm, Kind
from orchestrator.settings import HealSettings

WORLD = World(11)
BASELINE = WORLD.baseline(3000)
ALARM = Alarm("global", "base", 1e6, 6e4, 0.0, 100.0, 256)


def kind_of(sample, alarm=ALARM, fleet_size=2, **checks):
    found = diagnose(BASELINE, window(BASELINE, sample, **checks), alarm, fleet_size, HealSettings())
    assert found.reason
    assert all(isinstance(v, (float, str, bool)) for v in found.evidence.values())
    return found


def test_a_shift_that_costs_confidence_is_harmful():
    sample = WORLD.sample(256, shift=1.0)
    assert (sample.logits_NK.argmax(axis=1) == sample.labels_N).mean() < BASELINE.accuracy - 0.05  # it does harm
    found = kind_of(sample)
    assert found.kind is Kind.COVARIATE_HARMFUL
    assert found.estimated_loss > 0.05
    assert "threshold" in found.reason


def test_brighter_inputs_that_the_model_ignores_are_benign():
    sample = WORLD.sample(512)
    means_NC = sample.channel_means_NC + 15.0
    squares_NC = means_NC**2 + 40.0**2
    settings = HealSettings(harm_threshold=0.05)
    w = window(BASELINE, sample, channel_means_NC=means_NC, channel_squares_NC=squares_NC)
    assert diagnose(BASELINE, w, ALARM, 2, settings).kind is Kind.COVARIATE_BENIGN


def test_normal_traffic_is_none_and_unknown_where_only_a_segment_alarmed():
    sample = WORLD.sample(512)
    assert kind_of(sample).kind is Kind.NONE
    assert kind_of(sample, alarm=replace(ALARM, scope="segment:north")).kind is Kind.UNKNOWN


def test_a_change_of_class_shares_alone_is_a_prior_shift_with_its_priors():
    for priors in ([0.7, 0.1, 0.1, 0.1], [0.45, 0.45, 0.05, 0.05]):
        found = kind_of(WORLD.sample(600, priors=priors))
        assert found.kind is Kind.PRIOR_SHIFT
        assert [found.evidence[f"prior_{k}"] for k in range(4)] == pytest.approx(priors, abs=0.08)


def test_class_shares_and_inputs_changed_at_once_are_no_prior_shift():
    assert kind_of(WORLD.sample(600, shift=0.6, priors=[0.7, 0.1, 0.1, 0.1])).kind is Kind.COVARIATE_HARMFUL


@pytest.mark.parametrize("check", ["nan", "constant", "out_of_range", "duplicates"])
def test_inputs_that_fail_a_check_are_a_matter_of_data_quality(check):
    sample = WORLD.sample(256)
    bad = np.arange(256) % 5 == 0
    columns = {
        "nan": {"nan_N": bad.astype(int)},
        "constant": {"input_min_N": np.where(bad, 0.0, 1.0), "input_max_N": np.where(bad, 0.0, 254.0)},
        "out_of_range": {"input_max_N": np.where(bad, 1e5, 254.0)},
        "duplicates": {"hashes_N": np.where(bad, 0, np.arange(256))},
    }[check]
    found = kind_of(sample, **columns)
    assert found.kind is Kind.DATA_QUALITY
    assert found.evidence["check"] == check


def test_swapped_channels_are_recognised_by_their_order():
    sample = WORLD.sample(256, shift=0.5)
    swapped = {n: getattr(sample, n)[:, ::-1] for n in ("channel_means_NC", "channel_squares_NC")}
    found = kind_of(sample, **swapped)
    assert found.kind is Kind.DATA_QUALITY
    assert found.evidence["order"] == "[2, 1, 0]"


def test_a_forgotten_normalisation_is_recognised_by_the_gain():
    sample = WORLD.sample(256, shift=0.5)
    scaled = {
        "channel_means_NC": sample.channel_means_NC / 255,
        "channel_squares_NC": sample.channel_squares_NC / 255**2,
    }
    found = kind_of(sample, **scaled)
    assert found.kind is Kind.DATA_QUALITY
    assert found.evidence["gain"] == pytest.approx(1 / 255, rel=0.3)


def test_outputs_that_are_not_finite_are_a_matter_of_data_quality():
    sample = WORLD.sample(64)
    assert kind_of(replace(sample, logits_NK=sample.logits_NK * np.nan)).kind is Kind.DATA_QUALITY


def test_a_replica_that_strays_alone_is_faulty_but_a_fleet_of_one_is_not():
    sample, alarm = WORLD.sample(256, shift=1.0), replace(ALARM, scope="replica:r1")
    assert kind_of(sample, alarm=alarm, fleet_size=3).kind is Kind.REPLICA_FAULT
    assert kind_of(sample, alarm=alarm, fleet_size=1).kind is Kind.COVARIATE_HARMFUL


def test_errors_that_nothing_but_labels_show_are_concept_drift():
    w = window(BASELINE, WORLD.sample(512))
    alarm = replace(ALARM, cause="labels")
    assert diagnose(BASELINE, w, alarm, 2, HealSettings(), labels_say_harm=True).kind is Kind.CONCEPT
    w = window(BASELINE, WORLD.sample(512, shift=0.3))
    assert diagnose(BASELINE, w, alarm, 2, HealSettings(), labels_say_harm=True).kind is Kind.COVARIATE_HARMFUL


def test_a_source_that_strays_and_floods_is_suspicious_and_one_that_only_strays_is_not():
    w = window(BASELINE, WORLD.sample(256, shift=1.0), segment="north")
    alarm = replace(ALARM, scope="segment:north")
    assert diagnose(BASELINE, w, alarm, 2, HealSettings(), growth=5.0).kind is Kind.SUSPICIOUS_SOURCE
    assert diagnose(BASELINE, w, alarm, 2, HealSettings(), growth=1.2).kind is Kind.COVARIATE_HARMFUL
    assert diagnose(BASELINE, w, alarm, 2, HealSettings()).kind is Kind.COVARIATE_HARMFUL


def test_harm_that_is_not_clear_waits_for_more_instances_while_they_come():
    for sample, last_word in ((WORLD.sample(300, shift=0.6), Kind.COVARIATE_BENIGN), (WORLD.sample(300), Kind.NONE)):
        w = window(BASELINE, sample)
        loss = diagnose(BASELINE, w, ALARM, 2, HealSettings()).estimated_loss
        settings = HealSettings(harm_threshold=loss)  # right on the line: no telling from these
        assert diagnose(BASELINE, w, ALARM, 2, settings, final=False) is None
        assert diagnose(BASELINE, w, ALARM, 2, settings).kind is last_word


def test_a_shift_that_is_over_is_none_and_one_that_lasts_is_not():
    burst, after, lasting = WORLD.sample(150, shift=1.0), WORLD.sample(250), WORLD.sample(250, shift=1.0)
    early = window(BASELINE, burst)
    for later, kind in ((after, Kind.NONE), (lasting, Kind.COVARIATE_HARMFUL)):
        latest = window(BASELINE, later, 150.0)
        found = diagnose(BASELINE, merge([early, latest]), ALARM, 2, HealSettings(), latest=latest)
        assert found.kind is kind
    assert diagnose(BASELINE, early, ALARM, 2, HealSettings()).kind is Kind.COVARIATE_HARMFUL


def test_failing_requests_are_an_outage_or_one_replicas_fault():
    alarm = replace(ALARM, cause="failures", statistic=0.6, threshold=0.2)
    assert diagnose_failures(alarm).kind is Kind.OUTAGE
    found = diagnose_failures(replace(alarm, scope="replica:r1"))
    assert found.kind is Kind.REPLICA_FAULT
    assert "0.600 >= 0.200" in found.reason


def test_too_few_instances_are_unknown():
    assert kind_of(WORLD.sample(20, shift=1.0)).kind is Kind.UNKNOWN


def test_answers_that_collapse_to_one_class_are_harmful_however_sure_the_model_is():
    sample, settings = WORLD.sample(512), HealSettings(harm_threshold=0.05)
    means_NC = sample.channel_means_NC + 15.0
    # Half of what was another class is called class 0, with the confidence that each answer had.
    order_NK = np.argsort(-sample.logits_NK, axis=1)
    logits_NK = sample.logits_NK.copy()
    for i in np.flatnonzero((order_NK[:, 0] != 0) & (np.arange(512) % 3 > 0)):
        logits_NK[i, [0, order_NK[i, 0]]] = logits_NK[i, [order_NK[i, 0], 0]]
    collapsed = replace(sample, logits_NK=logits_NK)
    w = window(BASELINE, collapsed, channel_means_NC=means_NC, channel_squares_NC=means_NC**2 + 40.0**2)
    found = diagnose(BASELINE, w, ALARM, 2, settings)
    assert found.kind is Kind.COVARIATE_HARMFUL
    assert found.estimated_loss < 0.05
    assert "predicted classes moved" in found.reason
