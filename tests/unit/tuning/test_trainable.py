"""A trial heals what it can, leaves the base alone, keeps its best epoch and ends in time."""

import time

import numpy as np
import pytest
import torch

from orchestrator.errors import AdapterError
from orchestrator.messages import Placement, TrialConfig
from orchestrator.storage import open_storage
from tuning.adapter import merged_twin
from tuning.objective import information_loss, recompute_statistics, statistics_layers
from tuning.scoring import predict
from tuning.trainable import TrialRun, read_checkpoint


def accuracy(module, data):
    return float((predict(module, data[0], torch.device("cpu")).argmax(1) == data[1]).mean())


def run(bench, placement, **changes):
    config = TrialConfig(placement, **{"learning_rate": 1e-3, "epochs": 2, "adapter_rank": 4, **changes})
    trial = TrialRun(bench, config, "t1")
    while not trial.done:
        trial.step()
    return trial


def test_recomputed_statistics_heal_much_and_beat_the_base_in_score(bench, drifted):
    trial = run(bench, Placement.NORM_STATISTICS)
    twin = merged_twin(bench.module, *trial.export())
    assert accuracy(twin, drifted) > accuracy(bench.module, drifted) + 0.1
    result = trial.result()
    assert result.epochs == 1
    assert result.objective == "none"
    assert result.parameters == 0
    assert result.score > bench.score(bench.module, [])["score"] + 0.02


@pytest.mark.parametrize("replay_weight", [0.0, 1.0])
@pytest.mark.parametrize("placement", [Placement.NORM, Placement.EARLY, Placement.ALL])
def test_training_without_labels_leaves_the_base_bit_identical(bench, drifted, placement, replay_weight):
    before = {k: v.clone() for k, v in bench.module.state_dict().items()}
    trial = run(bench, placement, replay_weight=replay_weight)
    twin = merged_twin(bench.module, *trial.export())
    assert accuracy(twin, drifted) > accuracy(bench.module, drifted) + 0.1
    assert all(torch.equal(before[k], v) for k, v in bench.module.state_dict().items())
    assert trial.result().objective == ("restyled" if replay_weight else "infomax")
    assert trial.result().parameters > 0


def test_labels_make_it_supervised_and_their_held_out_accuracy_is_reported(labelled_bench, drifted):
    trial = run(labelled_bench, Placement.ALL, epochs=4)
    assert trial.result().objective == "supervised"
    twin = merged_twin(labelled_bench.module, *trial.export())
    assert trial.result().labelled_accuracy == pytest.approx(accuracy(twin, drifted), abs=0.12)


def test_equal_seeds_give_equal_adapters(bench):
    first, again = (run(bench, Placement.EARLY).export()[1] for _ in range(2))
    assert all(np.array_equal(first[k], again[k]) for k in first)


def test_the_best_epoch_is_kept(bench, monkeypatch):
    scores = iter([0.7, 0.9, 0.1])
    monkeypatch.setattr(
        bench, "score", lambda *_: {"score": next(scores), "labelled_accuracy": float("nan"), "temperature": 1.0}
    )
    trial = TrialRun(bench, TrialConfig(Placement.NORM, learning_rate=1e-2, epochs=3), "t1")
    trial.step()
    trial.step()
    best = trial.export()[1]
    assert trial.step()["score"] == 0.9
    assert all(np.array_equal(best[k], v) for k, v in trial.export()[1].items())


def test_training_ends_at_the_deadline(bench):
    trial = TrialRun(bench, TrialConfig(Placement.ALL, 4, 1e-3, epochs=1000), "t1", deadline_s=time.time())
    assert trial.step()["done"]


def test_a_loss_that_is_not_finite_fails_the_trial(bench):
    trial = TrialRun(bench, TrialConfig(Placement.NORM, learning_rate=1e-3, epochs=1), "t1")
    with torch.no_grad():
        next(trial.handle.parameters()).fill_(float("nan"))
    with pytest.raises(AdapterError, match="not finite"):
        trial.step()


def test_a_trial_goes_on_from_its_checkpoint(bench, tmp_path):
    config = TrialConfig(Placement.EARLY, 4, 1e-3, epochs=3)
    trial = TrialRun(bench, config, "t1")
    trial.step()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    trial.save(folder)
    resumed = TrialRun(bench, config, "t1")
    resumed.load(folder)
    assert resumed.epoch == 1
    assert resumed.result().score == trial.result().score
    stored = read_checkpoint(open_storage(str(tmp_path)), "checkpoint")
    assert stored[0] == trial.export()[0]
    assert all(np.array_equal(stored[1][k], v) for k, v in trial.export()[1].items())
    with pytest.raises(AdapterError, match="checkpoint"):
        TrialRun(bench, TrialConfig(Placement.EARLY, 8, 1e-3, epochs=3), "t2").load(folder)


def test_statistics_are_the_plain_average_over_all_rows(bench):
    import copy

    module = copy.deepcopy(bench.module)
    names = [n for n, m in module.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    seen = []
    first = module.get_submodule(names[0])
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    inputs = bench.parts["train"].inputs[:300]
    recompute_statistics(module, statistics_layers(module, names), inputs, torch.device("cpu"), batch=100)
    expected = torch.cat(seen).mean((0, 2, 3))
    torch.testing.assert_close(first.running_mean, expected, atol=1e-4, rtol=1e-4)
    assert first.momentum == 0.1
    assert not first.training


def test_information_loss_prefers_certain_and_diverse():
    certain = torch.eye(4).repeat(4, 1) * 20
    collapsed = torch.eye(4)[:1].repeat(16, 1) * 20
    unsure = torch.zeros(16, 4)
    assert information_loss(certain) < information_loss(unsure) - 1
    assert information_loss(certain) < information_loss(collapsed) - 1


def test_a_trial_that_cannot_end_in_time_plans_fewer_epochs_and_scores_the_last(bench, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tuning.trainable.time.time", lambda: now[0])
    monkeypatch.setattr("tuning.trainable.time.monotonic", lambda: now[0])
    trial = TrialRun(bench, TrialConfig(Placement.NORM, learning_rate=1e-3, epochs=50), "t1", deadline_s=1035.0)
    train = trial._train_epoch
    monkeypatch.setattr(trial, "_train_epoch", lambda o: (train(o), now.__setitem__(0, now[0] + 10.0)))
    scored = []
    score = bench.score
    monkeypatch.setattr(bench, "score", lambda *a: (scored.append(trial.epoch), score(*a))[1])
    while not trial.done:
        trial.step()
    assert trial.epoch == 3
    assert scored == [1, 2, 3]
