"""Labels and disagreements meet in either order, and each instance decides once."""

from orchestrator.canary import PairedTest
from orchestrator.messages import BASE, Disagreement, LabelArrived
from orchestrator.pairs import MAX_PAIRS, MAX_WANTED, Pairs
from orchestrator.state import Decided

PAIR = Disagreement("i1", "d1", 2, BASE, 0)
LABEL = LabelArrived("i1", "d1", 2, 2, 100.0)
WON = Decided("i1", "d1", True, BASE, False)


def test_a_label_decides_a_disagreement_whichever_comes_first() -> None:
    pairs = Pairs()
    pairs.take(PAIR, None)
    pairs.join(LABEL)
    assert pairs.decided == (WON,)
    pairs = Pairs()
    pairs.join(LABEL)
    pairs.take(PAIR, LABEL)
    assert pairs.decided == (WON,)


def test_an_instance_decides_once_and_is_forgotten_when_a_pass_has_counted_it() -> None:
    pairs = Pairs()
    pairs.take(PAIR, None)
    pairs.join(LABEL)
    pairs.join(LABEL)
    counted = pairs.decided
    pairs.take(Disagreement("i2", "d1", 1, BASE, 0), LabelArrived("i2", "d1", 1, 0, 100.0))
    pairs.forget(counted)
    assert pairs.decided == (Decided("i2", "d1", False, BASE, True),)


def test_those_who_label_see_the_newest_of_this_comparison_and_memory_is_bounded() -> None:
    pairs = Pairs()
    for n in range(MAX_PAIRS + 10):
        pairs.take(Disagreement(f"i{n}", "d1", 1, BASE, 0), None)
    pairs.take(Disagreement("other", "d0", 1, BASE, 0), None)
    shown = pairs.to_json(PairedTest("d1", BASE, 0.01))
    assert shown["unlabelled"] == MAX_PAIRS - 1
    assert shown["labels_wanted"][0] == f"i{MAX_PAIRS + 9}"
    assert len(shown["labels_wanted"]) == MAX_WANTED
