from pathlib import Path

import numpy as np
import pytest

import tiny
from orchestrator.cli.load import Sent
from orchestrator.cli.recompute import Recomputer, choose, two_faced
from orchestrator.datasets import Dataset
from orchestrator.messages import BASE
from orchestrator.models import publish_model
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage

ROWS = np.arange(4)


def reply(at_s: float, digest: str = BASE, generation: int = 0, logits: np.ndarray | None = None) -> Sent:
    return Sent("clean", ROWS, at_s, 0.01, np.zeros((4, 4)) if logits is None else logits, digest, generation)


def test_every_reply_near_a_swap_is_chosen_and_a_share_of_the_others() -> None:
    sent = [reply(t * 0.1, "new" if t >= 500 else BASE, int(t >= 500)) for t in range(1000)]
    chosen = choose(sent)
    near = [s for s in sent if abs(s.at_s - 50.0) <= 2.0]
    assert all(s in chosen for s in near)
    far = len(chosen) - len(near)
    assert far == pytest.approx(0.05 * (1000 - len(near)), abs=1)


def test_a_canary_that_alternates_does_not_make_the_check_endless() -> None:
    sent = [reply(t * 0.01, "new" if t % 2 else BASE) for t in range(5000)]
    assert len(choose(sent)) <= 600


def test_a_generation_that_names_two_digests_is_counted() -> None:
    assert two_faced([reply(1.0, BASE, 0), reply(2.0, "a", 1), reply(3.0, "b", 1), reply(4.0, "a", 1)]) == 1
    assert two_faced([reply(1.0, BASE, 0), reply(2.0, "a", 1), reply(3.0, BASE, 2)]) == 0


def test_replies_of_another_version_than_claimed_are_found(stripes: Path, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    base = publish_model(storage, load_spec(stripes / "model.yaml"))
    images, _ = tiny.make(4, seed=5)
    recomputer = Recomputer(storage, base)
    right = recomputer.logits(BASE, images)
    data = {"clean": Dataset(images)}
    assert recomputer.count_mixed([reply(0.0, logits=right), reply(1.0, logits=right + 5e-4)], data) == 0
    wrong = right.copy()
    wrong[2] += 0.01  # one row of another module
    assert recomputer.count_mixed([reply(0.0, logits=right), reply(1.0, logits=wrong)], data) == 1
