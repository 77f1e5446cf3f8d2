"""The search space suits the drift and the model, cheapest first."""

import pytest
from torch import nn

from orchestrator.messages import Kind, Placement
from tuning.candidates import search_space


class Net(nn.Sequential):
    def __init__(self, norm=True):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))


def placements(request, module=None, labelled_share=0.0):
    return [c.placement for c in search_space(request, module or Net(), labelled_share)]


def test_statistics_come_first_and_every_placement_once_before_any_twice(make_request):
    found = search_space(make_request(num_trials=6), Net(), 0.0)
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
    found = placements(make_request(kind=Kind.PRIOR_SHIFT, labels="50"), labelled_share=0.1)
    assert found[:2] == [Placement.LOGIT_CORRECTION, Placement.HEAD]


def test_a_concept_drift_starts_with_the_head(make_request):
    assert placements(make_request(kind=Kind.CONCEPT, labels="all"), labelled_share=1.0)[1] is Placement.HEAD


def test_the_rate_is_gentle_until_labels_hold_against_what_is_off_about_the_look(make_request):
    rates = [search_space(make_request(), Net(), share)[1].learning_rate for share in (0.0, 0.1, 1.0)]
    assert rates == [1e-3, 1e-3, 2e-3]


@pytest.mark.parametrize("labelled_share", [0.0, 1.0])
def test_a_model_without_norm_layers_has_no_norm_trials(make_request, labelled_share):
    found = placements(make_request(num_trials=9), Net(norm=False), labelled_share)
    assert Placement.NORM_STATISTICS not in found
    assert Placement.NORM not in found
    assert Placement.EARLY in found
