"""Baselines: deterministic, stored without pickle, honest about small and odd samples."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
from mixture import NUM_CHANNELS, World

from orchestrator.drift.baseline import baseline_key, decode_baseline, fit_baseline, load_baseline, save_baseline
from orchestrator.drift.null import p_value
from orchestrator.drift.sample import rows_of
from orchestrator.drift.yardstick import LEAST_SCORE_SD, Yardstick
from orchestrator.errors import DataError, IntegrityError, NotFound


class MemoryStorage:
    def __init__(self):
        self.files = {}

    def put(self, key, data):
        self.files[key] = data

    def get(self, key):
        if key not in self.files:
            raise NotFound(key)
        return self.files[key]

    def list(self, prefix):
        return sorted(k for k in self.files if k.startswith(prefix))


def entries(baseline):
    """Every array of a baseline and of its yardsticks, by name."""
    found = {}
    for f in fields(baseline):
        value = getattr(baseline, f.name)
        if isinstance(value, Yardstick):
            found |= {f"{f.name}.{g.name}": np.asarray(getattr(value, g.name)) for g in fields(value)}
        elif value is not None:
            found[f.name] = np.asarray(value)
    return found


def equal(left, right):
    ours, theirs = entries(left), entries(right)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name], equal_nan=name in ("accuracy", "atc_threshold")) for name in ours
    )


def test_equal_samples_give_equal_baselines():
    assert equal(World(1).baseline(200), World(1).baseline(200))


def test_a_stored_baseline_is_read_back_as_it_was():
    storage, baseline = MemoryStorage(), World(1).baseline(200)
    save_baseline(storage, baseline)
    assert list(storage.files) == [baseline_key(baseline.base, "base")]
    for loaded in (load_baseline(storage, "base", baseline.base), load_baseline(storage, "base")):
        assert equal(loaded, baseline)
        assert isinstance(loaded.temperature, float)
        assert isinstance(loaded.digest, str)


def test_a_baseline_that_is_not_there_is_none_and_broken_bytes_are_an_integrity_error():
    assert load_baseline(MemoryStorage(), "base", "b") is None
    assert load_baseline(MemoryStorage(), "base") is None
    with pytest.raises(IntegrityError, match="npz"):
        decode_baseline(b"nothing")


def test_a_digest_of_several_bases_must_be_asked_for_with_its_base():
    storage, baseline = MemoryStorage(), World(1).baseline(64)
    save_baseline(storage, baseline)
    save_baseline(storage, replace(baseline, base="other"))
    with pytest.raises(IntegrityError, match="pass base="):
        load_baseline(storage, "base")


def test_an_adapter_keeps_the_coordinates_of_its_base_and_knows_both_worlds():
    world = World(2)
    base = world.baseline(400)
    adapter = fit_baseline("b" * 8, "a" * 64, world.sample(200), world.sample(300, shift=0.8), base, NUM_CHANNELS)
    assert adapter.projection_DP is base.projection_DP
    assert adapter.frequencies_PF is base.frequencies_PF
    assert (adapter.normal_count, adapter.reference_count) == (300, 200)
    near = np.linalg.norm(adapter.reference_mean_M - base.normal_mean_M)
    far = np.linalg.norm(adapter.normal_mean_M - base.normal_mean_M)
    assert far > 2 * near


@pytest.mark.parametrize("num", [8, 9, 20])
def test_a_tiny_reference_gives_finite_numbers(num):
    baseline = World(3).baseline(num)
    for name, value in entries(baseline).items():
        assert value.dtype.kind in "US" or np.isfinite(value).all(), name


def test_constant_and_narrow_embeddings_are_accepted():
    sample = World(3).sample(50)
    constant = replace(sample, embedding_ND=np.ones((50, 5)))
    narrow = replace(sample, embedding_ND=sample.embedding_ND[:, :1])
    for odd in (constant, narrow):
        baseline = fit_baseline("b", "base", odd, None, None, NUM_CHANNELS)
        assert np.isfinite(baseline.outputs.tables_ST).all()
        assert baseline.projection_DP.shape[1] == 1


def test_unlabelled_references_have_no_accuracy_but_all_else():
    sample = replace(World(3).sample(100), labels_N=None)
    baseline = fit_baseline("b", "base", sample, None, None, NUM_CHANNELS)
    assert np.isnan(baseline.accuracy)
    assert baseline.temperature == 1.0
    assert baseline.confusion_KK.sum() == pytest.approx(1.0)


def test_unusable_samples_are_refused_with_rule_and_value():
    sample = World(3).sample(20)
    with pytest.raises(DataError, match=">= 8 instances; got 7"):
        fit_baseline("b", "base", rows_of(sample, slice(0, 7)), None, None, NUM_CHANNELS)
    with pytest.raises(DataError, match="finite"):
        fit_baseline("b", "base", replace(sample, logits_NK=sample.logits_NK * np.nan), None, None, NUM_CHANNELS)
    with pytest.raises(DataError, match="4 channels; got 3"):
        fit_baseline("b", "base", sample, None, None, 4)


def test_very_wide_tables_are_tested_by_their_embedding_alone_and_stored_so():
    sample, storage = World(3).sample(50), MemoryStorage()
    wide = {n: np.tile(getattr(sample, n), (1, 22)) for n in ("channel_means_NC", "channel_squares_NC")}
    baseline = fit_baseline("b", "base", replace(sample, **wide), None, None, 66)
    assert baseline.inputs is None
    save_baseline(storage, baseline)
    assert equal(load_baseline(storage, "base"), baseline)


def test_p_values_fall_with_the_statistic_and_stay_positive():
    baseline = World(3).baseline(200)
    table_T = baseline.outputs.tables_ST[0]
    p = [p_value(t, table_T) for t in np.linspace(0, 50 * table_T[-2], 400)]
    assert p[0] == 1.0
    assert all(a >= b > 0 for a, b in itertools.pairwise(p))


def test_the_labelled_reference_calibrates_confidence():
    baseline = World(4).baseline(2000)
    assert baseline.reference_confidence == pytest.approx(baseline.accuracy, abs=0.03)


def test_an_embedding_without_leading_directions_is_seen_along_random_ones():
    rng = np.random.default_rng(0)
    flat_ND = rng.standard_normal((2000, 200))
    for spread_D, leads in ((np.ones(200), False), (np.arange(1, 201.0) ** -1.0, True)):
        embedding_ND = flat_ND * spread_D
        sample = replace(World(2).sample(2000), embedding_ND=embedding_ND)
        baseline = fit_baseline("b", "base", sample, None, None, NUM_CHANNELS)
        fresh_NP = (rng.standard_normal((4000, 200)) * spread_D - baseline.center_D) @ baseline.projection_DP
        assert fresh_NP.var(axis=0).mean() == pytest.approx(1.0, abs=0.06)  # as wide as it was fitted
        along_D = (baseline.projection_DP**2).sum(axis=1) * spread_D**2  # what is seen of each direction
        assert (along_D[:20].sum() > 0.25 * along_D.sum()) == leads


def test_columns_with_long_tails_are_left_to_the_embedding():
    rng = np.random.default_rng(0)
    sample = World(2).sample(2000)
    means_NC = np.stack([np.exp(1.5 * rng.standard_normal(2000)), *rng.standard_normal((2, 2000))], axis=1)
    for columns, tested in (([1, 2, 1], [True, True, True]), ([0, 1, 2], [False, True, True])):
        table = replace(sample, channel_means_NC=means_NC[:, columns], channel_squares_NC=means_NC[:, columns] ** 2)
        baseline = fit_baseline("b", "base", table, None, None, NUM_CHANNELS)
        assert (np.abs(baseline.inputs.mix_VW[:3]).sum(axis=1) > 0).tolist() == tested
    only = replace(sample, channel_means_NC=means_NC[:, [0, 0, 0]], channel_squares_NC=means_NC[:, [0, 0, 0]] ** 2)
    assert fit_baseline("b", "base", only, None, None, NUM_CHANNELS).inputs is None


def test_a_model_that_is_always_sure_has_its_entropy_not_blown_up():
    sample = World(2).sample(400)
    sure = replace(sample, logits_NK=sample.logits_NK * 1e4, labels_N=None)
    outputs = fit_baseline("b", "base", sure, None, None, NUM_CHANNELS).outputs
    assert np.isfinite(outputs.tables_ST).all()
    assert outputs.mix_VW[-1] <= np.sqrt(len(outputs.mix_VW)) / LEAST_SCORE_SD
