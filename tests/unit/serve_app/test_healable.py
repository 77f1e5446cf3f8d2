"""`Healable` around a small module, with an orchestrator in memory: no Ray."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_service import KEY, SHIFT, Memory, build, healable, images, make_adapter

from orchestrator.drift.baseline import fit_baseline, save_baseline
from orchestrator.errors import RequestError, SpecError
from orchestrator.messages import BASE, Report, Target
from orchestrator.models import fetch_model, load_published_spec
from orchestrator.registry import write_stable
from orchestrator.storage import open_storage
from serve_app.healable import Healable
from tuning.base_model import build_module, collect_sample, feature_tap


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    made: list[Healable] = []

    def start(memory: Memory, **options: Any) -> Healable:
        made.append(healable(tmp_path, memory, **options))
        return made[-1]

    yield start
    for model in made:
        model.close()


def plain(inputs: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return build()(torch.from_numpy(inputs))


def put_baseline(model: Healable, digest: str = BASE) -> None:
    module = build()
    tap = feature_tap(module, model.spec, images(2))
    sample = collect_sample(module, tap, images(100, seed=1), torch.device("cpu"), layout=model.spec.layout)
    channels = sample.channel_means_NC.shape[1]
    save_baseline(model.storage, fit_baseline(model.config.base, digest, sample, None, None, channels))


def test_called_like_the_module_it_answers_like_the_module(started: Any) -> None:
    model, x = started(Memory()), images(5)
    assert torch.equal(model(torch.from_numpy(x)), plain(x))
    assert torch.equal(model(x), plain(x))
    answer = model.infer(x)
    np.testing.assert_array_equal(answer.logits, plain(x).numpy())
    assert (answer.generation, answer.digest, len(answer.ids)) == (0, BASE, 5)


def test_published_base_is_the_spec_file_where_the_values_agree_and_the_modules_own_elsewhere(
    started: Any, tmp_path: Path
) -> None:
    same = started(Memory())
    folder = fetch_model(same.storage, same.config.base)
    assert (folder / "weights.safetensors").read_bytes() == (tmp_path / "spec" / "weights.safetensors").read_bytes()
    trained = build()
    with torch.no_grad():
        trained.get_submodule("head").bias.add_(1.0)
    other = Healable(
        trained, spec=tmp_path / "spec" / "model.yaml", storage=str(tmp_path / "storage"), connect=Memory().connect
    )
    other.close()
    assert other.config.base != same.config.base
    folder = fetch_model(other.storage, other.config.base)
    again = build_module(folder, load_published_spec(folder))
    with torch.no_grad():
        assert torch.equal(again(torch.from_numpy(images(3))), other(images(3)))


def test_target_is_prepared_and_served_and_reported(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    digest = make_adapter(model.storage, model.config.base, 2)
    memory.target = Target(1, digest, (BASE, digest), feedback_key=KEY)
    memory.wait(lambda r: r.generation == 1 and r.digest == digest)
    answer = model.infer(images(3))
    assert (answer.generation, answer.digest) == (1, digest)
    np.testing.assert_allclose(answer.logits[:, 2] - plain(images(3)).numpy()[:, 2], SHIFT, atol=1e-3)
    np.testing.assert_array_equal(model.infer(images(3), version=BASE).logits, plain(images(3)).numpy())
    memory.target = Target(2, BASE, (BASE,), feedback_key=KEY)
    memory.wait(lambda r: r.generation == 2 and r.versions == (BASE,))
    with pytest.raises(RequestError) as caught:
        model.infer(images(1), version=digest)
    assert caught.value.status == 404


def test_new_replica_has_its_adapter_before_its_first_answer(started: Any, tmp_path: Path) -> None:
    first = started(Memory())
    digest = make_adapter(first.storage, first.config.base, 1)
    late = started(Memory(target=Target(4, digest, (BASE, digest), feedback_key=KEY)))
    assert late.infer(images(1)).generation == 4


def test_without_an_orchestrator_a_replica_starts_from_the_stable_generation_of_its_own_base(started: Any) -> None:
    first = started(Memory())
    digest = make_adapter(first.storage, first.config.base, 1)
    write_stable(first.storage, first.config.base, 6, digest)
    alone = started(Memory(down=True), first_target_s=0.1)
    assert (alone.infer(images(1)).generation, alone.current.digest) == (6, digest)
    write_stable(first.storage, "another-base", 7, digest)
    stranger = started(Memory(down=True), first_target_s=0.1)
    assert (stranger.infer(images(1)).generation, stranger.current.digest) == (0, BASE)


def test_adapter_that_does_not_fit_is_reported_and_not_served(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    digest = make_adapter(model.storage, "another-base", 2)
    memory.target = Target(1, digest, (BASE,), feedback_key=KEY)
    memory.wait(lambda r: "must be made for base" in r.failure)
    assert (model.current.generation, model.current.digest) == (0, BASE)
    memory.target = Target(2, BASE, (BASE,), feedback_key=KEY)
    memory.wait(lambda r: r.generation == 2 and r.failure == "")


def test_windows_are_reported_once_a_baseline_is_there(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    model.infer(images(32))
    put_baseline(model)
    memory.wait(lambda r: model._probes.get(BASE) is not None)
    for seed in range(3):
        model.infer(images(32, seed), segment="cam")
    model.infer(images(32), monitor=False)
    memory.wait(lambda r: sum(w.count for q in memory.reports for w in q.windows) >= 96)
    memory.wait(lambda r: r.instances == 5 * 32)
    model.close()
    windows = [w for r in memory.reports for w in r.windows]
    assert {(w.base, w.digest, w.segment) for w in windows} == {(model.config.base, BASE, "cam")}
    assert sum(w.count for w in windows) == 96
    assert all(w.sums.dtype == np.int64 for w in windows)


def test_segments_of_one_batch_are_told_apart(started: Any) -> None:
    from serve_app.forward import Ask

    memory = Memory()
    model = started(memory)
    put_baseline(model)
    memory.wait(lambda r: model._probes.get(BASE) is not None)
    asks = [Ask(images(40, i), f"r{i}", segment="ab"[i % 2], monitor=i != 3) for i in range(5)]
    answers = model.infer_many(asks)
    for ask, answer in zip(asks, answers, strict=True):
        np.testing.assert_allclose(answer.logits, plain(ask.inputs).numpy(), atol=1e-6)
    memory.wait(lambda r: sum(w.count for q in memory.reports for w in q.windows) == 160)
    counts: dict[str, int] = {}
    for window in (w for r in memory.reports for w in r.windows):
        counts[window.segment] = counts.get(window.segment, 0) + window.count
    assert counts == {"a": 120, "b": 40}


def test_equal_inputs_of_different_requests_are_duplicates_within_one_window(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    put_baseline(model)
    memory.wait(lambda r: model._probes.get(BASE) is not None)
    x = images(1)
    for _ in range(32):
        model.infer(x)
        x = x.copy()
    memory.wait(lambda r: bool(r.windows))
    (window,) = [w for r in memory.reports for w in r.windows]
    layout = model._probes.get(BASE).layout
    assert (window.count, int(window.sums[layout.slices["checks"]][-1])) == (32, 31)


def test_rows_short_of_a_window_are_reported_after_a_second(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    put_baseline(model)
    memory.wait(lambda r: model._probes.get(BASE) is not None)
    inputs = torch.from_numpy(images(3))
    model(inputs)
    inputs.zero_()  # the caller may reuse its tensor while the rows wait
    memory.wait(lambda r: bool(r.windows))
    (window,) = [w for r in memory.reports for w in r.windows]
    assert window.count == 3
    assert int(window.sums[model._probes.get(BASE).layout.slices["checks"]][-1]) == 0


def test_late_label_joins_what_was_predicted_and_reaches_report_and_storage(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    answer = model.infer(images(3))
    counts = model.feedback([(model.token(answer), 1, 2), ("junk", 0, 1)])
    assert counts == {"accepted": 1, "unknown": 1, "expired": 0, "conflicting": 0}
    memory.wait(lambda r: bool(r.labels))
    (label,) = [label for r in memory.reports for label in r.labels]
    assert (label.instance_id, label.label) == (answer.ids[1], 2)
    assert label.prediction == int(answer.logits[1].argmax())
    model.close()
    storage, base = model.storage, model.config.base
    (key,) = storage.list(f"traffic/labels/base={base}/")
    assert pq.read_table(io.BytesIO(storage.get(key))).to_pylist()[0]["id"] == answer.ids[1]
    (key,) = storage.list(f"traffic/base={base}/")
    assert answer.ids[1] in pq.read_table(io.BytesIO(storage.get(key)))["id"].to_pylist()


def test_lost_answers_repeat_a_report_and_lose_no_instance(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    put_baseline(model)
    memory.wait(lambda r: model._probes.get(BASE) is not None)
    memory.lose_answers = 6
    for seed in range(4):
        model.infer(images(32, seed))
    memory.wait(lambda r: r.instances >= 128 and not memory.lose_answers)
    model.close()
    by_sequence: dict[int, Report] = {}
    for report in memory.reports:
        assert by_sequence.setdefault(report.sequence, report) is report
    assert len(memory.reports) > len(by_sequence)
    assert sorted(by_sequence) == list(range(len(by_sequence)))
    assert sum(w.count for r in by_sequence.values() for w in r.windows) == 128


def test_serving_goes_on_while_the_orchestrator_is_away_and_catches_up_when_it_is_back(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    put_baseline(model)
    memory.wait(lambda r: model._probes.get(BASE) is not None)
    memory.down = True
    for seed in range(20):
        np.testing.assert_array_equal(model.infer(images(32, seed)).logits, plain(images(32, seed)).numpy())
    memory.down = False
    memory.wait(lambda r: r.instances == 640)
    model.close()
    unique = {r.sequence: r for r in memory.reports}
    assert sum(w.count for r in unique.values() for w in r.windows) == 640


def test_monitoring_that_breaks_fails_no_request(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = started(Memory())
    monkeypatch.setattr(model._observer, "_summarise", lambda *_: 1 / 0)
    np.testing.assert_array_equal(model.infer(images(2)).logits, plain(images(2)).numpy())


def test_failing_forward_is_raised_and_counted(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    with pytest.raises(RuntimeError):
        model.infer(np.zeros((1, 5), np.uint8))
    memory.wait(lambda r: r.errors == 1)


def test_no_answer_is_mixed_while_targets_change_under_load(started: Any) -> None:
    memory = Memory()
    model = started(memory)
    labels = {make_adapter(model.storage, model.config.base, label): label for label in (1, 2)}
    x, stop, mixed = images(16), threading.Event(), []
    base_logits = plain(x).numpy()
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            answer = model.infer(x)
            want = np.zeros((16, 4))
            if answer.digest != BASE:
                want[:, labels[answer.digest]] = SHIFT
            seen.add(answer.digest)
            if not np.allclose(answer.logits - base_logits, want, atol=1e-3):
                mixed.append(answer.digest)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for generation in range(1, 16):
        memory.target = Target(generation, [*labels, BASE][generation % 3], (BASE, *labels), feedback_key=KEY)
        memory.wait(lambda r, g=generation: r.generation == g)
    stop.set()
    for thread in threads:
        thread.join()
    assert mixed == []
    assert seen == {*labels, BASE}


def test_large_request_runs_in_pieces_with_one_version(started: Any) -> None:
    model, x = started(Memory()), images(700)
    np.testing.assert_allclose(model.infer(x).logits, plain(x).numpy(), atol=1e-5)


def test_unknown_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="unknown setting 'modes'"):
        healable(tmp_path, Memory(), modes="auto")


def test_store_none_keeps_no_inputs(started: Any) -> None:
    model = started(Memory(), store="none")
    model.infer(images(4))
    model.close()
    assert open_storage(model.storage.uri).list("traffic/") == []
