"""Labels that come late, and what is removed: on a real storage, written by the parts that write it live."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.cli.main import run
from orchestrator.cli.notes import read_notes
from orchestrator.drift.baseline import baseline_key
from orchestrator.journal import Journal, verify_journal
from orchestrator.keys import load_keys
from orchestrator.messages import Kind, SearchRequest
from orchestrator.models import publish_model
from orchestrator.registry import save_adapter
from orchestrator.spec import load_spec
from orchestrator.state import State
from orchestrator.storage import Storage, open_storage
from serve_app.traffic import Rows, TrafficLog
from tuning.buffer import Buffer, collect

DAY_S = 86400.0
WHY = ["--reason", "asked for"]


@pytest.fixture(scope="module")
def base_model(stripes: Path) -> Path:
    return stripes / "model.yaml"


@pytest.fixture
def place(base_model: Path, tmp_path: Path) -> tuple[Storage, str]:
    """A storage with a model, a signed journal and traffic of two requests, one of them ten days old."""
    storage = open_storage(tmp_path / "records")
    base = publish_model(storage, load_spec(base_model))
    log = TrafficLog(storage, base, "r1")
    now_s = time.time()
    for name, at_s in (("old", now_s - 10 * DAY_S), ("new~0a", now_s)):
        ids = tuple(f"{name}/{row}" for row in range(3))
        inputs = np.random.default_rng(len(name)).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
        assert log.offer(Rows(ids, at_s, "", "base", 0, inputs, np.eye(4, dtype=np.float32)[:3]))
    log.close()
    Journal(storage, load_keys("upkeep")).append("started", {"base": base}, State(base=base).to_dict())
    return storage, base


def stored(storage: Storage, base: str, labels: str = "none") -> Buffer:
    """What a search would read."""
    return collect(
        storage,
        SearchRequest(
            episode="e1", base=base, storage=storage.uri, kind=Kind.COVARIATE_HARMFUL, since_s=0.0, until_s=4e9,
            seed=0, labels=labels, max_instances=100, budget_s=1.0, num_trials=1, epochs=1, trial_device="cpu",
        ),
    )  # fmt: skip


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def labels_file(path: Path, rows: list[tuple[str, str]], key: str = "id") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([(key, "label"), *rows])
    return path


def test_imported_labels_are_what_a_search_reads(
    place: tuple[Storage, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, base = place
    file = labels_file(tmp_path / "l.csv", [("old/0", "vertical"), ("new~0a/2", "3"), ("nobody/0", "1")])
    code, counts = answer(capsys, "labels", "import", str(file), "--storage", storage.uri, "--reason", "panel A")
    assert (code, counts) == (1, {"accepted": 2, "unknown": 1, "conflicting": 0})
    found = stored(storage, base, "all")
    assert {n: int(v) for n, v in zip(found.ids, found.labels, strict=True) if v >= 0} == {"old/0": 1, "new~0a/2": 3}
    again = labels_file(tmp_path / "again.csv", [("old/0", "0"), ("new~0a/2", "3")])
    code, counts = answer(capsys, "labels", "import", str(again), "--storage", storage.uri)
    assert (code, counts["conflicting"], counts["accepted"]) == (1, 1, 1)
    assert read_notes(storage)[0]["reason"] == "panel A"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("token,label\nx,1\n", "column 'id'"),
        ("id,label\nold/0,\n", "row 1"),
        ("id,label\nold/0,stripes\n", "'stripes'"),
        ("id,label\nold/0,9\n", "'9'"),
        ("id,label,index\nold/0,1,-1\n", "index"),
        ("", "rows"),
    ],
)
def test_bad_labels_change_nothing_and_are_named(
    place: tuple[Storage, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    storage, base = place
    (tmp_path / "bad.csv").write_text(text)
    assert run(["labels", "import", str(tmp_path / "bad.csv"), "--storage", storage.uri]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert stored(storage, base, "all").num_labelled == 0


def test_an_erasure_by_id_takes_the_instance_its_labels_and_nothing_else(
    place: tuple[Storage, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, base = place
    file = labels_file(tmp_path / "l.csv", [("new~0a/0", "1"), ("new~0a/1", "1"), ("old/0", "1")])
    assert run(["labels", "import", str(file), "--storage", storage.uri]) == 0
    purge = ["traffic", "purge", "--storage", storage.uri, *WHY]
    code, told = answer(capsys, *purge, "--id", "new~0a/0", "--dry-run")
    assert (code, told["instances"], told["labels"], len(stored(storage, base))) == (0, 1, 1, 6)
    assert answer(capsys, *purge, "--id", "new~0a/0")[1]["instances"] == 1
    assert sorted(stored(storage, base).ids) == ["new~0a/1", "new~0a/2", "old/0", "old/1", "old/2"]
    code, told = answer(capsys, *purge, "--id", "new", "--id", "nobody")  # the id that the client gave
    assert (code, told["instances"], told["labels"], told["unknown"]) == (1, 2, 1, ["nobody"])
    assert sorted(stored(storage, base).ids) == ["old/0", "old/1", "old/2"]
    assert "new" not in json.dumps(read_notes(storage)).replace("new~", "")  # who was forgotten is not remembered


def test_an_erasure_names_the_adapters_that_may_have_learned_from_it(
    place: tuple[Storage, str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage, base = place
    young, old = adapter(storage, base, 1, age_days=0), adapter(storage, base, 2, age_days=9)
    other = adapter(storage, "0" * 64, 3, age_days=0)
    purge = ["traffic", "purge", "--storage", storage.uri, *WHY]
    told = answer(capsys, *purge, "--id", "new~0a/0", "--dry-run")[1]
    assert (young in told["adapters"], old in told["adapters"], other in told["adapters"]) == (True, False, False)
    assert answer(capsys, *purge, "--id", "new~0a/0")[1]["adapters"] == told["adapters"]
    assert read_notes(storage)[-1]["body"]["adapters"] == told["adapters"]
    assert run([*purge, "--id", "new~0a/1"]) == 0
    assert "may have learned from them" in capsys.readouterr().out


def test_traffic_past_its_time_goes_and_all_of_it_on_demand(
    place: tuple[Storage, str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage, base = place
    purge = ["traffic", "purge", "--storage", storage.uri, *WHY]
    assert answer(capsys, *purge, "--older-than", "5")[1]["instances"] == 3
    assert all(name.startswith("new") for name in stored(storage, base).ids)
    assert answer(capsys, *purge, "--all")[1]["instances"] == 3
    assert len(stored(storage, base)) == 0
    assert run(purge) == 2
    assert run([*purge, "--all", "--older-than", "1"]) == 2
    assert run([*purge, "--older-than", "-1"]) == 2


def adapter(storage: Storage, base: str, number: int, age_days: float, episode: str = "e0001") -> str:
    tensors = {"base_model.model.head.lora_A.weight": np.full((1, 2), number, np.float32)}
    data = {"until_s": time.time() - age_days * DAY_S}
    manifest = {"base": base, "episode": episode, "data": data}
    digest = save_adapter(storage, {"peft_type": "LORA", "r": 1}, tensors, manifest, load_keys("upkeep"))
    storage.put(baseline_key(base, digest), b"statistics")
    return digest


def test_gc_removes_only_what_no_rollback_may_name(
    place: tuple[Storage, str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage, base = place
    stable, before, useless, young = (adapter(storage, base, n, age) for n, age in enumerate((30, 30, 30, 1)))
    state = State(base=base, stable=stable, previous=before, promoted=(before, stable), generation=2)
    Journal(storage, load_keys("upkeep")).append("promoted", {}, state.to_dict())
    gc = ["adapters", "gc", "--storage", storage.uri, *WHY]
    assert answer(capsys, *gc, "--dry-run")[1]["removed"] == [useless]
    assert storage.list(f"adapters/{useless}/")
    assert answer(capsys, *gc)[1]["removed"] == [useless]
    assert not storage.list(f"adapters/{useless}/")
    assert not storage.exists(baseline_key(base, useless))
    left = {key.split("/")[1] for key in storage.list("adapters/")}
    assert left == {stable, before, young}
    assert run(["adapters", "verify", "--storage", storage.uri]) == 0
    assert verify_journal(storage).problems == []
    assert run(["audit", "verify", "--storage", storage.uri, "--service", "upkeep"]) == 0


def test_gc_without_a_journal_refuses_as_nobody_knows_what_is_needed(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(tmp_path / "bare")
    base = publish_model(storage, load_spec(base_model))
    adapter(storage, base, 1, 30)
    assert run(["adapters", "gc", "--storage", storage.uri, *WHY]) == 2
    assert "journal" in capsys.readouterr().err
    assert storage.list("adapters/")


@pytest.mark.parametrize("command", [["adapters", "gc"], ["traffic", "purge", "--all"]])
def test_what_removes_needs_a_reason(place: tuple[Storage, str], command: list[str]) -> None:
    storage = place[0]
    before = storage.list("")
    assert run([*command, "--storage", storage.uri]) == 2
    assert run([*command, "--storage", storage.uri, "--reason", "  "]) == 2
    assert storage.list("") == before


def test_a_forged_or_unsigned_note_fails_the_audit(
    place: tuple[Storage, str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = place[0]
    assert run(["traffic", "purge", "--storage", storage.uri, "--all", *WHY]) == 0
    assert run(["audit", "verify", "--storage", storage.uri]) == 0
    key = storage.list("upkeep/")[0]
    storage.put(key, storage.get(key).replace(b"asked for", b"not asked"))
    code, told = answer(capsys, "audit", "verify", "--storage", storage.uri)
    assert code == 1
    assert key in told["problems"][0]
