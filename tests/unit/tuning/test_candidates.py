"""The search space suits the drift and the model, cheapest first."""

import pytest
from torch import nn

from orchestrator.messages import Kind, Placement
from tuning.candidates import search_space


class Net(nn.Sequential):
    def __init__(self, norm=True):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))


def placements(request, module=None):
    return [c.placement for c in search_space(request, module or Net())]


def test_statistics_come_first_and_every_placement_once_before_any_twice(make_request):
    found = search_space(make_request(num_trials=6), Net())
    assert [c.placement for c in found[:4]] == [
        Placement.NORM_STATISTICS,
        Placement.ALL,
        Placement.EARLY,
        Placement.NORM,
    ]
    assert len(found) == len(set(found)) == 6
    assert all(c.adapter_rank > 0 for c in found if c.placement in (Placement.EARLY, Placement.ALL))


def test_the_number_of_trials_is_kept(make_request):
    assert placements(make_request(num_trials=1)) == [Placement.NORM_STATISTICS]
    assert len(placements(make_request(num_trials=15))) == 15


def test_a_prior_shift_without_labels_is_only_corrected(make_request):
    assert placements(make_request(kind=Kind.PRIOR_SHIFT)) == [Placement.LOGIT_CORRECTION]


def test_a_prior_shift_with_labels_also_trains_the_head(make_request):
    found = placements(make_request(kind=Kind.PRIOR_SHIFT, labels="50"))
    assert found[:2] == [Placement.LOGIT_CORRECTION, Placement.HEAD]


def test_a_concept_drift_starts_with_the_head(make_request):
    assert placements(make_request(kind=Kind.CONCEPT, labels="all"))[1] is Placement.HEAD


@pytest.mark.parametrize("labels", ["none", "all"])
def test_a_model_without_norm_layers_has_no_norm_trials(make_request, labels):
    found = placements(make_request(num_trials=9, labels=labels), Net(norm=False))
    assert Placement.NORM_STATISTICS not in found
    assert Placement.NORM not in found
    assert Placement.EARLY in found
