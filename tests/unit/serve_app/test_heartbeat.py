"""A replica reports once per report, asks again until it is answered, and never stops for the orchestrator's sake."""

from __future__ import annotations

from orchestrator.messages import BASE, Report, Target
from serve_app.heartbeat import SLOW_CALLS, LinkError, Pulse


class Link:
    """Fails as scripted, else answers."""

    def __init__(self, *failures: LinkError | None) -> None:
        self.failures = list(failures)
        self.sent: list[int] = []

    def heartbeat(self, report: Report, timeout_s: float) -> Target:
        self.sent.append(report.sequence)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return Target(1, BASE)


def report(sequence: int) -> Report:
    return Report("r", "i", sequence, "b", 0, BASE, (BASE,))


def pulse(link: Link, applied: list[Target], dialled: list[int] | None = None) -> Pulse:
    def connect() -> Link:
        if dialled is not None:
            dialled.append(1)
        return link

    return Pulse(connect, report, applied.append, 0.01)


def test_unanswered_report_is_sent_again_with_its_sequence_number() -> None:
    link, applied = Link(None, LinkError("slow", lost=False), None, None), []
    beats = pulse(link, applied)
    assert [beats.beat() for _ in range(4)] == [True, False, True, True]
    assert link.sent == [0, 1, 1, 2]
    assert len(applied) == 3
    assert beats.problem == ""


def test_lost_orchestrator_is_looked_up_again() -> None:
    dialled: list[int] = []
    beats = pulse(Link(LinkError("died", lost=True)), [], dialled)
    assert not beats.beat()
    assert beats.link is None
    assert beats.beat()
    assert len(dialled) == 2


def test_orchestrator_that_stays_silent_is_looked_up_again() -> None:
    dialled: list[int] = []
    link = Link(*[LinkError("slow", lost=False)] * SLOW_CALLS)
    beats = pulse(link, [], dialled)
    for _ in range(SLOW_CALLS + 1):
        beats.beat()
    assert len(dialled) == 2
    assert set(link.sent) == {0}


def test_report_that_the_orchestrator_cannot_take_is_given_up_and_the_gap_shows() -> None:
    link = Link(LinkError("bug", lost=False, refused=True))
    beats = pulse(link, [])
    beats.beat()
    beats.beat()
    assert link.sent == [0, 1]


def test_factory_that_raises_leaves_a_problem_and_is_tried_again() -> None:
    def connect() -> Link:
        raise ImportError("no orchestrator here")

    beats = Pulse(connect, report, lambda _: None, 0.01)
    assert not beats.beat()
    assert "no orchestrator here" in beats.problem
    assert not beats.applied.is_set()
