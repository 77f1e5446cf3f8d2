"""Evidence on parts: a planted adapter that gains on average and loses a minority class, or one site, is refused."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from stored_traffic import write_traffic

import tiny
from orchestrator.datasets import write_dataset
from orchestrator.gate import clean_loss, decide
from orchestrator.messages import Analysis, Compared, GateEvidence, Kind, SearchRequest, SegmentEstimate
from orchestrator.models import publish_model
from orchestrator.registry import save_adapter
from orchestrator.settings import HealSettings
from orchestrator.spec import load_spec
from orchestrator.storage import open_storage
from tuning.adapter_format import PREFIX, merged_twin
from tuning.finish import measure
from tuning.paired import JUDGED_ROWS, _balanced_rows, compare_classes, segment_evidence
from tuning.prepare import prepare_base
from tuning.records import read_evidence, write_evidence
from tuning.scoring import predict
from tuning.trainable import TrialRun
from tuning.workbench import load_workbench

RARE = 3  # checker: 8% of the reference and of the traffic


def uneven(n, seed, drift=False):
    """Of `tiny.make`, a quarter of the rare class's rows."""
    inputs, labels = tiny.make(n, seed, drift)
    kept = (labels != RARE) | (np.random.default_rng(seed).random(n) < 0.25)
    return inputs[kept], labels[kept]


class Site:
    """A storage with a model, its traffic and a search request; adapters are planted on it."""

    def __init__(self, folder, model, inputs, answers, segments=None, metric="accuracy", **request):
        shutil.copytree(model.parent, folder / "model", ignore=shutil.ignore_patterns("__pycache__"))
        write_dataset(folder / "model" / "reference.parquet", *uneven(2000, seed=2))
        spec = folder / "model" / "model.yaml"
        spec.write_text(spec.read_text() + f"metric: {metric}\n")
        self.storage = open_storage(str(folder / "storage"))
        base = publish_model(self.storage, load_spec(spec))
        write_traffic(self.storage, base, inputs, answers, segments)
        prepare_base(self.storage, base, "cpu")
        values = {"labels": "none", "kind": Kind.COVARIATE_HARMFUL, "seed": 0, "budget_s": 100.0, "num_trials": 1}
        values |= {"since_s": 0.0, "until_s": 1e9, "max_instances": 2000, "epochs": 1, "trial_device": "cpu"}
        self.request = SearchRequest(
            **{**values, "episode": folder.name, "base": base, "storage": self.storage.uri, **request}
        )
        self.bench = load_workbench(self.storage, self.request)

    def healed(self):
        """Config and tensors of recomputed norm statistics, the healthy adapter."""
        run = TrialRun(self.bench, self.bench.configurations()[0], "t", time.time() + 100)
        run.step()
        return run.export()

    def without_rare(self, recall):
        """The healthy adapter with the head's bias lowered until the rare class keeps that recall under the drift."""
        config, tensors = self.healed()
        inputs, labels = uneven(2000, seed=77, drift=True)
        logits = predict(merged_twin(self.bench.module, config, tensors), inputs[labels == RARE], self.bench.device)
        margins = logits[:, RARE] - np.delete(logits, RARE, axis=1).max(axis=1)
        head = {name: p.detach().numpy().copy() for name, p in self.bench.module.head.named_parameters()}
        head["bias"][RARE] -= np.quantile(margins, 1.0 - recall)
        config = {**config, "modules_to_save": [*config["modules_to_save"], "head"]}
        return config, {**tensors, **{f"{PREFIX}head.{name}": value for name, value in head.items()}}

    def judged(self, config, tensors):
        """Evidence and decision."""
        digest = save_adapter(self.storage, config, tensors, {"base": self.request.base}, None)
        evidence = measure(self.storage, self.request, digest)
        assert evidence.error == ""
        return evidence, decide(evidence, self.request.kind, HealSettings())

    def accuracy(self, config=None, tensors=None):
        """True accuracy under the drift, of the base without arguments."""
        module = self.bench.module if config is None else merged_twin(self.bench.module, config, tensors)
        inputs, labels = uneven(2000, seed=78, drift=True)
        return float((predict(module, inputs, self.bench.device).argmax(axis=1) == labels).mean())


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_model):
    return Site(tmp_path_factory.mktemp("site"), tiny_model, *uneven(800, seed=50, drift=True))


def test_an_adapter_that_gains_on_average_and_loses_a_minority_class_is_refused(site):
    planted = site.without_rare(recall=0.25)
    assert site.accuracy(*planted) > site.accuracy() + 0.02
    evidence, decision = site.judged(*planted)
    assert decision.analysis is Analysis.FAILED
    assert decision.message.startswith("class checker with the traffic's look: recall under the candidate 0.")
    assert ";" not in decision.message  # nothing else saw it
    assert evidence.look_change > 0.02
    assert evidence.classes[0].name == "checker"
    assert evidence.num_classes == 4


def test_a_healthy_adapter_passes_class_by_class(site):
    healthy = site.healed()
    evidence, decision = site.judged(*healthy)
    assert decision.analysis is Analysis.SUCCESSFUL, decision.message
    assert evidence.look_instances == len(site.bench.reference_gate.inputs)
    assert abs(evidence.look_base + evidence.look_change - site.accuracy(*healthy)) < 0.05
    assert evidence.estimate_base < evidence.estimate_bound < site.accuracy(*healthy)
    assert evidence.segments == ()
    assert evidence.metric_base == evidence.reference_base


def test_a_class_that_left_the_traffic_is_not_lost_by_the_adapter(tmp_path, tiny_model):
    inputs, labels = uneven(900, seed=50, drift=True)
    site = Site(tmp_path, tiny_model, inputs[labels != 1], labels[labels != 1])
    evidence, decision = site.judged(*site.healed())
    assert evidence.classes_lost == 0
    assert decision.analysis is Analysis.SUCCESSFUL, decision.message
    config, tensors = site.without_rare(recall=0.0)
    tensors[f"{PREFIX}head.bias"][RARE] -= 100.0
    evidence, decision = site.judged(config, tensors)
    assert evidence.classes_lost == 1
    assert "classes lost" in decision.message


def test_evidence_survives_its_file_and_older_files_still_load(site):
    evidence, _ = site.judged(*site.healed())
    evidence = replace(evidence, segments=(SegmentEstimate("north", 3, share=0.5),))
    write_evidence(site.storage, "kept", evidence)
    again = read_evidence(site.storage, "kept", evidence.candidate)
    assert repr(again) == repr(evidence)  # nan is not equal to itself
    assert all(isinstance(row, Compared) for row in again.classes)
    old = GateEvidence("d0", 400, 0.9, 0.86, 0.25, 12.0, 3.0, 0.18, 0.1, 0, 0.55, 0.75)
    site.storage.put("trials/kept/evidence-d0.json", _old_file(old))
    assert repr(read_evidence(site.storage, "kept", "d0")) == repr(old)


def _old_file(evidence):
    """As the release before per-class evidence wrote it."""
    known = list(GateEvidence.__dataclass_fields__)
    known = known[: known.index("error") + 1]
    values = {name: getattr(evidence, name) for name in known}
    return json.dumps({k: None if v != v else v for k, v in values.items()}).encode()


def test_one_clean_camera_among_drifted_ones_refuses_what_costs_the_old_world(site, tmp_path, tiny_model):
    inputs, answers = uneven(1300, seed=50, drift=True)
    segments = np.where(np.arange(len(answers)) % 9 == 0, "north", "south")
    north = np.flatnonzero(segments == "north")
    inputs[north], answers[north] = (part[: len(north)] for part in uneven(400, seed=51))
    mixed = Site(tmp_path, tiny_model, inputs, answers, segments.tolist())
    evidence, decision = mixed.judged(*site.healed())  # healed where all traffic had drifted
    assert clean_loss(evidence) < HealSettings().max_clean_loss
    assert decision.analysis is Analysis.FAILED
    assert "clean loss in segment north" in decision.message
    assert "south" not in decision.message


def test_labels_name_the_class_and_the_declared_metric_decides(tmp_path, tiny_model):
    traffic = uneven(2400, seed=50, drift=True)
    site = Site(tmp_path, tiny_model, *traffic, metric="f1:checker", labels="all")
    evidence, decision = site.judged(*site.without_rare(recall=0.25))
    assert evidence.metric == "f1:checker"
    assert evidence.labelled_classes[0].name == "checker"
    assert "class checker in labelled traffic: recall under the candidate 0." in decision.message
    assert evidence.labelled_metric_candidate < 0.6
    good, passed = site.judged(*site.healed())
    assert good.labelled_metric_candidate > 0.9
    assert good.labelled_p_gain < 0.05
    assert passed.analysis is Analysis.SUCCESSFUL, passed.message
    assert not passed.provisional


def test_rare_classes_keep_all_their_rows():
    labels = np.repeat([0, 1, 2], [900, 300, 20])
    rows = _balanced_rows(labels, np.random.default_rng(0))
    counts = np.bincount(labels[rows])
    assert counts.tolist() == [240, 240, 20]
    assert counts.sum() <= JUDGED_ROWS
    assert len(_balanced_rows(labels[::5], np.random.default_rng(0))) == len(labels[::5])
    assert len(_balanced_rows(np.arange(900), np.random.default_rng(0))) == JUDGED_ROWS


def test_classes_are_ordered_by_how_they_fared():
    labels = np.repeat([0, 1, 2], 20)
    base, candidate = labels.copy(), labels.copy()
    base[:5] = 2
    candidate[20:30] = 0
    worst, *others = compare_classes(("a", "b", "c"), labels, base, candidate)
    assert worst == Compared("b", 20, 1.0, 0.5, 0, 10, f1_base=1.0, f1_candidate=pytest.approx(2 / 3))
    assert [row.name for row in others] == ["c", "a"]


def test_a_segment_of_few_rows_is_not_judged(site):
    gate = replace(site.bench.parts["gate"], segments=np.array(["a"] * len(site.bench.parts["gate"])))
    gate.segments[:10] = "b"
    change = np.linspace(0.0, 0.2, len(gate))
    drifted = np.zeros(200, bool)
    found = {s.name: s for s in segment_evidence(gate, change, np.repeat(["a", "b"], [150, 50]), drifted)}
    assert found["a"].share > 0.9
    assert np.isnan([found["b"].share, found["b"].estimate_change]).all()
    assert found["b"].instances == 10
