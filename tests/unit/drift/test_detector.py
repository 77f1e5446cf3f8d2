"""The promise of the sequential test: rare false alarms on fresh references, early true ones."""

import dataclasses
import json

import numpy as np
import pytest
from mixture import World, window

from orchestrator.drift import evalues
from orchestrator.drift.detector import Detector, ShiryaevRoberts
from orchestrator.drift.null import SCALES, TOLERANCE, distance_statistic, p_value
from orchestrator.drift.statistics import fourier_features, read

ARL = 20_000  # instances between false alarms, for the simulations


def test_the_calibrated_evalue_costs_no_more_than_its_discount():
    p = (np.arange(50_000) + 0.5) / 50_000
    assert np.mean([evalues.p_to_e(v) for v in p]) <= evalues.DISCOUNT
    assert evalues.p_to_e(0.0) == evalues.MAX_EVALUE


def test_shiryaev_roberts_alarms_no_more_often_than_its_threshold_says():
    rng, threshold, alarms, steps = np.random.default_rng(0), 200.0, 0, 60_000
    test = ShiryaevRoberts()
    for z in rng.standard_normal(steps):
        test.update(float(np.exp(z - 0.5)), 0.0)  # a fair bet: the expectation is exactly 1
        if test.total >= threshold:
            alarms, test = alarms + 1, ShiryaevRoberts()
    assert alarms > 0
    assert steps / alarms >= threshold


@pytest.mark.parametrize("num_reference", [60, 1500])
def test_mean_time_between_false_alarms_keeps_its_promise_on_fresh_references(num_reference):
    """Fresh world, reference and stream each time; both feature scales, vectorised, the sums as in Detector."""
    threshold, alarms, instances = ARL / SCALES[0], 0, 0
    for seed in range(4):
        world = World(seed)
        baseline = world.baseline(num_reference)
        features_NM = fourier_features(baseline, world.sample(32 * 384).embedding_ND)
        means_SM = features_NM.reshape(384, 32, -1).mean(axis=1)
        fine, coarse = ShiryaevRoberts(), ShiryaevRoberts(steps=8)
        use_coarse = baseline.normal_count >= evalues.COARSE_MIN_REFERENCE
        for i, mean_M in enumerate(means_SM):
            fine.update(_evalue(baseline, mean_M, 0), float(i))
            if use_coarse and i % 8 == 7:
                coarse.update(_evalue(baseline, means_SM[i - 7 : i + 1].mean(axis=0), 1), float(i))
            if (0.35 * fine.total + 0.25 * coarse.total) / (0.6 if use_coarse else 0.35) >= threshold:
                alarms, fine, coarse = alarms + 1, ShiryaevRoberts(), ShiryaevRoberts(steps=8)
        instances += 32 * len(means_SM)
    assert instances / max(alarms, 1) >= ARL


def _evalue(baseline, mean_M, row):
    t = distance_statistic(mean_M, baseline.normal_mean_M, SCALES[row], baseline.normal_count, TOLERANCE)
    return evalues.p_to_e(p_value(t, baseline.null_quantiles_SQ[row], float(baseline.null_tails_S[row])))


def test_normal_traffic_raises_no_alarm_at_the_default_setting():
    world = World(1)
    detector = Detector(world.baseline(), 1e6 / 32 * 2)
    for i in range(60):
        assert not detector.absorb(window(detector.baseline, world.sample(32), 32.0 * i))
    assert detector.instances == 60 * 32


def test_a_severe_shift_alarms_within_128_instances_and_the_onset_is_dated():
    for seed in range(3):
        world = World(seed)
        detector = Detector(world.baseline(600), 1e6 / 32 * 2)
        for i in range(100 + seed):  # the drift begins out of step with the detector's merging
            detector.absorb(window(detector.baseline, world.sample(5), 5.0 * i))
        onset_s = 5.0 * (100 + seed)
        for i in range(26):
            if detector.absorb(window(detector.baseline, world.sample(5, shift=1.0), onset_s + 5.0 * i)):
                break
        else:
            pytest.fail("no alarm within 130 instances")
        assert abs(detector.onset_s - onset_s) <= 40


@pytest.mark.parametrize("name", evalues.CHECK_FLOORS)
def test_each_input_check_alarms_by_itself(name):
    world = World(2)
    baseline = world.baseline(400)
    detector = Detector(baseline, 1e6 / 32 * 2)
    at = baseline.layout.slices["checks"].start + list(evalues.CHECKS).index(name)
    for i in range(6):
        w = window(baseline, world.sample(32), 32.0 * i)
        sums = w.sums.copy()
        sums[at] = 20
        if detector.absorb(dataclasses.replace(w, sums=sums)):
            return
    pytest.fail(f"no alarm for {name}")


def test_brighter_inputs_alarm_even_where_the_embedding_is_normal():
    world = World(2)
    detector = Detector(world.baseline(), 1e6 / 32 * 2)
    raised = []
    for i in range(8):
        sample = world.sample(32)
        means_NC = sample.channel_means_NC + 30.0
        raised.append(detector.absorb(window(detector.baseline, sample, 32.0 * i, channel_means_NC=means_NC)))
    assert raised.index(True) * 32 <= 128


def test_a_window_without_valid_instances_is_no_evidence_of_a_shift():
    world = World(2)
    baseline = world.baseline(200)
    sample = world.sample(40)
    empty = dataclasses.replace(sample, embedding_ND=sample.embedding_ND * np.nan)
    summary = read(baseline.layout, window(baseline, empty))
    assert evalues.feature_p_value(baseline, summary) == 1.0
    assert evalues.return_evalue(baseline, summary) == 1.0
    assert evalues.difference_p_value(baseline, summary, summary) == 1.0


def test_a_snapshot_is_json_and_continues_where_it_was_taken():
    world = World(3)
    detector = Detector(world.baseline(), 1e5)
    for i in range(3):
        detector.absorb(window(detector.baseline, world.sample(32, shift=0.2), 32.0 * i))
    twin = Detector(detector.baseline, 1e5)
    twin.restore(json.loads(json.dumps(detector.snapshot())))
    assert (twin.statistic, twin.onset_s, twin.instances) == (
        detector.statistic,
        detector.onset_s,
        detector.instances,
    )


def test_a_threshold_must_be_positive():
    with pytest.raises(ValueError, match="must be > 0"):
        Detector(World(3).baseline(64), 0.0)
