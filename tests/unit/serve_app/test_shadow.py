"""Old and new side by side on a replica: what they answer differently is reported, and no request waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_service import KEY, Memory, build, healable, images, make_adapter
from torch import nn

from orchestrator.errors import AdapterError
from orchestrator.messages import BASE, Disagreement, Target
from serve_app.healable import Healable
from serve_app.shadow import MAX_ROWS


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[tuple[Healable, Memory, str]]:
    """A replica that serves an adapter which always says class 1, compared with the base on every request."""
    memory = Memory()
    model = healable(tmp_path, memory)
    digest = make_adapter(model.storage, model.config.base, 1)
    memory.target = Target(1, digest, (BASE, digest), "canary", KEY, BASE, 1.0)
    memory.wait(lambda report: report.generation == 1)
    yield model, memory, digest
    model.close()


def found(memory: Memory) -> list[Disagreement]:
    return [pair for report in memory.reports for pair in report.disagreements]


def base_classes(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(build()(torch.from_numpy(x)).argmax(dim=1).numpy())


def test_one_instance_of_a_request_that_the_two_answer_differently_is_reported_with_both_answers(canary: Any) -> None:
    model, memory, digest = canary
    x = images(40, seed=5)
    answers = [model.infer(x[:20]), model.infer(x[20:])]
    memory.wait(lambda report: report.compared >= 40)
    base_N = base_classes(x)
    pairs = found(memory)
    assert len(pairs) == 2, "rows of one request are no bets of their own"
    for start, pair in zip((0, 20), sorted(pairs, key=lambda p: p.instance_id not in answers[0].ids), strict=True):
        row = int(pair.instance_id.rpartition("/")[2])
        assert pair == Disagreement(answers[start > 0].ids[row], digest, 1, BASE, int(base_N[start + row]))


def test_what_the_caller_does_to_its_array_afterwards_changes_no_comparison(canary: Any) -> None:
    model, memory, _ = canary
    alike = make_adapter(model.storage, model.config.base, int(base_classes(images(1))[0]))
    memory.target = Target(2, alike, (BASE, alike), "canary", KEY, BASE, 1.0)
    memory.wait(lambda report: report.generation == 2)
    shadow, seen = model._shadow, []
    inner = shadow._runner.run

    class Spy:
        def run(self, module: Any, asks: Any) -> Any:
            seen.extend(np.array(ask.inputs) for ask in asks)
            return inner(module, asks)

    shadow._runner = Spy()
    x = images(8)
    before = x.copy()
    with shadow._changed:  # it cannot start before the array is overwritten
        model.infer(x)
        x[:] = 0
    memory.wait(lambda report: report.compared > 0)
    np.testing.assert_array_equal(seen[0], before)


def test_what_both_answer_alike_is_counted_and_not_reported(canary: Any) -> None:
    model, memory, _ = canary
    x = images(40, seed=5)
    alike = make_adapter(model.storage, model.config.base, int(base_classes(x)[0]))
    memory.target = Target(2, alike, (BASE, alike), "canary", KEY, BASE, 1.0)
    memory.wait(lambda report: report.generation == 2)
    model.infer(x[base_classes(x) == base_classes(x)[0]])
    memory.wait(lambda report: report.compared > 0)
    assert found(memory) == []


def test_a_report_carries_each_disagreement_once(canary: Any) -> None:
    model, memory, _ = canary
    model.infer(images(40, seed=5))
    memory.wait(lambda report: report.disagreements)
    seen = len(found(memory))
    after = len(memory.reports)
    memory.wait(lambda report: report.sequence >= memory.reports[after - 1].sequence + 3)
    assert len(found(memory)) == seen


def test_a_named_version_and_an_unmonitored_request_are_not_compared(canary: Any) -> None:
    model, memory, digest = canary
    model.infer(images(8), version=BASE)
    model.infer(images(8), version=digest)
    model.infer(images(8), monitor=False)
    model.infer(images(3, seed=9))
    memory.wait(lambda report: report.compared > 0)
    assert memory.reports[-1].compared == 3


def test_of_a_large_request_only_its_first_rows_are_compared(canary: Any) -> None:
    model, memory, _ = canary
    model.infer(images(MAX_ROWS + 50))
    memory.wait(lambda report: report.compared > 0)
    assert memory.reports[-1].compared == MAX_ROWS


def test_a_version_that_cannot_be_run_costs_no_answer_and_is_said(canary: Any, caplog: Any) -> None:
    model, memory, digest = canary

    class Broken(nn.Module):
        head = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AdapterError("cannot run")

    model._twins._modules["broken"] = Broken()
    memory.target = Target(2, digest, (BASE, digest, "broken"), "canary", KEY, "broken", 1.0)
    memory.wait(lambda report: report.generation == 2)
    assert len(model.infer(images(4)).logits) == 4
    memory.target = Target(3, digest, (BASE, digest), "canary", KEY, BASE, 1.0)
    memory.wait(lambda report: report.generation == 3)
    model.infer(images(4))
    memory.wait(lambda report: report.compared >= 4)
    assert "versions are not compared: " in caplog.text


def test_nothing_is_compared_where_nothing_is_asked_for(canary: Any) -> None:
    model, memory, digest = canary
    memory.target = Target(2, digest, (BASE, digest), "stable", KEY)
    memory.wait(lambda report: report.generation == 2)
    before = memory.reports[-1].compared
    for _ in range(5):
        model.infer(images(4))
    count = len(memory.reports)
    memory.wait(lambda report: report.sequence >= memory.reports[count - 1].sequence + 3)
    assert memory.reports[-1].compared == before
