"""The peers of the healing benchmark behave as their papers say, on a small real problem with a drift that hurts."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from benchmarks.healing.peer_run import pass_by
from benchmarks.healing.peers import cotta as cotta_peer
from benchmarks.healing.peers import selective, supervised
from benchmarks.healing.peers import shot as shot_peer
from benchmarks.healing.peers.base import Given, entropy
from benchmarks.healing.peers.iabn import InstanceAwareNorm
from benchmarks.healing.peers.lame import affinity, agree
from benchmarks.healing.peers.note import BalancedMemory
from benchmarks.healing.peers.registry import PEERS
from benchmarks.healing.peers.roid import likelihood_ratio
from benchmarks.healing.peers.shot import centroid_labels
from benchmarks.healing.peers.views import view
from orchestrator.datasets import Dataset
from orchestrator.spec import load_spec
from tuning.base_model import build_module, feature_tap
from tuning.scoring import predict

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_model):
    """The tiny model, in eval mode."""
    torch.set_num_threads(1)
    return build_module(tiny_model.parent, load_spec(tiny_model))


@pytest.fixture(scope="module")
def tap(base, tiny_model):
    return feature_tap(base, load_spec(tiny_model), tiny.make(2, seed=4)[0])


@pytest.fixture
def given(base, tap):
    """A function that makes what a peer is given."""

    def make(**changes):
        values = {
            "module": base,
            "tap": tap,
            "device": CPU,
            "source": Dataset(*tiny.make(256, seed=6)),
            "num_classes": 4,
        }
        return Given(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def mixed():
    """Drifted images in random order, with labels."""
    return tiny.make(800, seed=11, drift=True)


@pytest.fixture(scope="module")
def ordered():
    """Mildly drifted images, one class after the other."""
    (clean, labels), (drifted, _) = tiny.make(800, seed=11), tiny.make(800, seed=11, drift=True)
    order = np.argsort(labels, kind="stable")
    return (0.15 * clean + 0.85 * drifted).astype(np.uint8)[order], labels[order]


@pytest.fixture(scope="module")
def fresh():
    """Drifted images that no peer adapts on."""
    return tiny.make(600, seed=12, drift=True)


def accuracy(module, rows):
    return float((predict(module, rows[0], CPU).argmax(axis=1) == rows[1]).mean())


def online(peer, rows):
    return float((pass_by(peer, rows[0]) == rows[1]).mean())


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def after(peer, rows):
    """The frozen model of a peer that saw rows."""
    pass_by(peer, rows[0])
    return peer.frozen()


@pytest.mark.parametrize("name", ["bn", "tent", "eata", "sar", "roid", "cotta"])
def test_batch_normalising_methods_heal_a_mixed_stream_online_and_frozen(name, base, given, mixed, fresh, monkeypatch):
    monkeypatch.setattr(cotta_peer, "NUM_VIEWS", 4)
    lost = accuracy(base, mixed)
    peer = PEERS[name](given())
    assert online(peer, mixed) > lost + 0.1
    assert accuracy(peer.frozen(), fresh) > accuracy(base, fresh) + 0.1


@pytest.mark.parametrize("name", ["bn", "tent"])
def test_statistics_of_one_class_batches_are_worse_than_nothing(name, base, given, ordered):
    assert online(PEERS[name](given()), ordered) < accuracy(base, ordered) - 0.15


@pytest.mark.parametrize("name", ["note", "lame"])
def test_note_and_lame_gain_where_batches_show_one_class(name, base, given, ordered):
    assert online(PEERS[name](given()), ordered) > accuracy(base, ordered) + 0.01


def test_no_peer_touches_the_base(base, given, mixed, monkeypatch):
    monkeypatch.setattr(cotta_peer, "NUM_VIEWS", 1)
    monkeypatch.setattr(shot_peer, "NUM_EPOCHS", 1)
    monkeypatch.setattr(supervised, "MIN_STEPS", 2)
    monkeypatch.setattr(supervised, "NUM_EPOCHS", 1)
    monkeypatch.setattr(supervised, "HEAD_EPOCHS", 2)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    for kind in PEERS.values():
        after(kind(given(labels_N=mixed[1][:130])), (mixed[0][:130],))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_a_peer_gives_the_same_answers_with_the_same_seed(given, mixed):
    one, two = (pass_by(PEERS["roid"](given(seed=3)), mixed[0][:400]) for _ in range(2))
    assert np.array_equal(one, two)


def test_tent_lowers_the_entropy_of_its_batch(given, mixed):
    peer = PEERS["tent"](given())
    x = torch.from_numpy(mixed[0][:200])
    values = [float(entropy(peer.adapt(x)).mean()) for _ in range(4)]
    assert values == sorted(values, reverse=True)


def test_entropy_is_that_of_the_softmax():
    assert entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([[50.0, 0.0]])).item() == pytest.approx(0, abs=1e-6)


def test_eata_skips_unsure_rows_and_rows_like_the_average(given):
    peer = PEERS["eata"](given())
    sure, unsure = torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[0.1, 0, 0, 0]])
    other = torch.tensor([[0, 9.0, 0, 0]])
    assert peer.chosen(torch.cat([sure, unsure])).tolist() == [True, False]
    peer.average_K = sure.softmax(dim=1)[0]
    assert peer.chosen(torch.cat([sure, unsure, other])).tolist() == [False, False, True]


def test_eata_leaves_the_weights_alone_when_no_row_is_chosen(given, mixed):
    peer = PEERS["eata"](given())
    peer.margin = 0.0
    before = weights(peer.module)
    peer.adapt(torch.from_numpy(mixed[0][:200]))
    assert peer.used == 0
    assert torch.equal(weights(peer.module), before)


def test_eata_is_held_near_the_source_by_its_fisher_weights(given, mixed, monkeypatch):
    monkeypatch.setattr(selective, "SIMILARITY", 1.1)  # of four classes nothing is unlike the average
    free, held = PEERS["eata"](given()), PEERS["eata"](given())
    held.fisher = [torch.full_like(f, 1e4) for f in held.fisher]
    assert all((f >= 0).all() for f in free.fisher)
    assert sum(float(f.sum()) for f in free.fisher) > 0
    start = weights(free.module)
    for peer in (free, held):
        pass_by(peer, mixed[0])
    away = [float((weights(peer.module) - start).norm()) for peer in (held, free)]
    assert away[0] < 0.5 * away[1]


def test_sars_uphill_step_has_its_radius_and_is_taken_back_to_the_bit(given, mixed):
    peer = PEERS["sar"](given())
    entropy(peer.module(torch.from_numpy(mixed[0][:200]))).mean().backward()
    start = weights(peer.module)
    before = peer.climb()
    assert float((weights(peer.module) - start).norm()) == pytest.approx(0.05, rel=1e-3)
    peer.descend(before)
    assert torch.equal(weights(peer.module), start)


def test_sar_returns_to_the_source_after_a_collapse_and_tunes_no_last_layers(given, mixed, monkeypatch):
    monkeypatch.setattr(selective, "RECOVERY", 0.0)
    peer = PEERS["sar"](given())
    start = weights(peer.module)
    peer.adapt(torch.from_numpy(mixed[0][:200]))
    assert not torch.equal(weights(peer.module), start)
    assert peer.resets == 0
    monkeypatch.setattr(selective, "RECOVERY", 10.0)
    peer.adapt(torch.from_numpy(mixed[0][200:400]))
    assert torch.equal(weights(peer.module), start)
    assert (peer.average, peer.resets) == (None, 1)
    assert len(peer.parameters) == 4  # both of the model's two layers: three quarters of two round to two


def test_roid_weighs_sure_and_diverse_rows_and_drops_the_common_ones(given):
    peer = PEERS["roid"](given())
    peer.average_K = torch.tensor([0.97, 0.01, 0.01, 0.01])
    logits = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 2.0, 1, 0]])
    weights_N = peer.weights(logits)
    assert weights_N[:2].tolist() == [0, 0]
    assert weights_N[2] > weights_N[3] > 0


def test_roid_draws_every_weight_a_hundredth_of_the_way_back(given):
    peer = PEERS["roid"](given())
    start = [p.detach().clone() for p in peer.parameters]
    with torch.no_grad():
        for parameter in peer.parameters:
            parameter += 1.0
    peer.draw_back()
    for parameter, origin in zip(peer.parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach(), origin + 0.99)


def test_the_soft_likelihood_ratio_pulls_sure_rows_where_entropy_no_longer_does():
    logits = torch.tensor([[4.0, 0, 0, 0]], requires_grad=True)
    (flat,) = torch.autograd.grad(entropy(logits).sum(), logits)
    (steep,) = torch.autograd.grad(likelihood_ratio(logits).sum(), logits)
    assert steep.abs().max() > flat.abs().max()
    assert steep[0, 0] < 0


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_cottas_restore_returns_single_weights_with_its_probability(probability):
    source, moved = nn.Linear(100, 100), nn.Linear(100, 100)
    drifted = weights(moved)
    cotta_peer.restore(moved, source, probability, torch.Generator().manual_seed(0))
    back = weights(moved) == weights(source)
    assert float(back.float().mean()) == pytest.approx(probability, abs=0.02)
    assert torch.equal(weights(moved)[~back], drifted[~back])


def test_cottas_teacher_follows_slowly_and_looks_once_where_the_source_is_sure(given, mixed, monkeypatch):
    peer = PEERS["cotta"](given())
    looks = []
    monkeypatch.setattr(cotta_peer, "view", lambda x, *_, **__: looks.append(1) or x)
    x = torch.from_numpy(mixed[0][:50])
    monkeypatch.setattr(cotta_peer, "SURE", 0.0)
    peer.target(x)
    assert not looks
    monkeypatch.setattr(cotta_peer, "SURE", 1.1)
    peer.target(x)
    assert len(looks) == cotta_peer.NUM_VIEWS
    start = weights(peer.teacher)
    with torch.no_grad():
        for parameter in peer.module.parameters():
            parameter += 1.0
    peer.follow()
    torch.testing.assert_close(weights(peer.teacher), start + 0.001, atol=1e-5, rtol=0)


def test_a_view_is_of_the_images_own_type_and_another_each_time(mixed):
    x = torch.from_numpy(mixed[0][:8])
    rng = torch.Generator().manual_seed(0)
    for smooth in (True, False):
        one, two = (view(x, "HWC", rng, smooth) for _ in range(2))
        assert one.dtype == torch.uint8
        assert one.shape == x.shape
        assert not torch.equal(one, two)
    table = torch.rand(8, 5)
    assert view(table, "F", rng, True) is table


def test_notes_layer_is_plain_normalisation_but_for_instances_that_stray():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3).eval()
    layer = InstanceAwareNorm.replacing(plain, 0.01)
    usual = torch.randn(64, 3, 8, 8)
    torch.testing.assert_close(layer(usual), plain(usual), atol=1e-4, rtol=1e-4)
    far = usual + 5
    assert layer(far).mean().item() < 1 < plain(far).mean().item()
    layer.train()
    layer(far)
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 0.05), atol=0.005, rtol=0)


def test_notes_memory_stays_balanced_when_classes_come_in_a_row():
    memory = BalancedMemory(64, seed=0)
    for label in range(4):
        for number in range(200):
            memory.add(torch.tensor(number), label)
    assert memory.counts() == {0: 16, 1: 16, 2: 16, 3: 16}
    assert max(int(row) for row in memory.rows()) > 100


def test_lame_moves_a_lone_dissenter_to_its_neighbours_and_no_weight(base, given, mixed):
    features = torch.tensor([[1.0, 0.01 * i] for i in range(6)] + [[0.01 * i, 1.0] for i in range(6)])
    p = torch.tensor([[0.8, 0.2]] * 5 + [[0.45, 0.55]] + [[0.2, 0.8]] * 6)
    assert affinity(features).sum(dim=1).tolist() == [5.0] * 12
    assert affinity(features).diagonal().sum() == 0
    assert agree(p.log(), affinity(features)).argmax(dim=1).tolist() == [0] * 6 + [1] * 6
    peer = PEERS["lame"](given())
    pass_by(peer, mixed[0][:256])
    assert torch.equal(weights(peer.frozen()), weights(base))


def test_shots_centroids_correct_a_wrong_answer_and_ignore_classes_nobody_was_given():
    rng = torch.Generator().manual_seed(0)
    features = torch.cat([torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])]).repeat_interleave(20, 0)
    features = features + 0.1 * torch.randn(features.shape, generator=rng)
    p = torch.tensor([[0.9, 0.05, 0.05]] * 20 + [[0.05, 0.9, 0.05]] * 20)
    p[3] = torch.tensor([0.1, 0.8, 0.1])
    labels = centroid_labels(features, p)
    assert labels.tolist() == [0] * 20 + [1] * 20


def test_shot_heals_offline_and_keeps_the_classifier(base, given, mixed, fresh):
    peer = PEERS["shot"](given())
    peer.epochs = 3
    assert pass_by(peer, mixed[0]) is None
    module = peer.frozen()
    assert accuracy(module, fresh) > accuracy(base, fresh) + 0.1
    assert torch.equal(module.head.weight, base.head.weight)
    assert not torch.equal(module.body[0].weight, base.body[0].weight)


def test_supervised_tuning_uses_the_labelled_rows_only_and_heals(base, given, mixed, fresh, monkeypatch):
    monkeypatch.setattr(supervised, "HEAD_EPOCHS", 20)
    monkeypatch.setattr(supervised, "MIN_STEPS", 60)
    labels = np.where(np.arange(len(mixed[1])) < 400, mixed[1], -1)
    norm = accuracy(after(PEERS["bn"](given()), mixed), fresh)
    for name in ("full", "head"):
        peer = PEERS[name](given(labels_N=labels))
        module = after(peer, mixed)
        assert accuracy(module, fresh) > norm - 0.02
        assert len(peer.labelled_rows()[0]) == 400
        assert torch.equal(module.body[0].weight, base.body[0].weight) is (name == "head")
        assert not torch.equal(module.head.weight, base.head.weight)


def test_supervised_tuning_learns_what_its_labels_say(given, mixed):
    rows, swapped = mixed[0][:300], (mixed[1][:300] + 1) % 4
    module = after(PEERS["full"](given(labels_N=swapped, rate=10)), (rows,))
    assert accuracy(module, (rows, swapped)) > 0.8


def test_supervised_tuning_refuses_a_stream_without_labels(given, mixed):
    peer = PEERS["full"](given(labels_N=np.full(len(mixed[1]), -1)))
    pass_by(peer, mixed[0])
    with pytest.raises(ValueError, match="needs >= 2 labelled rows; got 0"):
        peer.frozen()


def test_every_peer_keeps_to_its_interface(given, mixed):
    for kind in PEERS.values():
        peer = kind(given(labels_N=mixed[1][:64].copy()))
        x = torch.from_numpy(mixed[0][:64])
        answers = peer.adapt(x)
        assert answers.shape == (64, 4)
        assert not answers.requires_grad
        if peer.online:
            assert not copy.deepcopy(peer.frozen()).training
