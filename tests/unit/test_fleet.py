"""Requests that fail: an outage of all, a fault of one, and neither."""

from dataclasses import replace

import pytest

from orchestrator.fleet import Fleet
from orchestrator.messages import Report


def report(tag, sequence, requests, errors):
    return Report(tag, "i0", sequence, "b", 1, "base", ("base",), requests=requests, errors=errors)


def fleet(*rows):
    """Two reports a replica, half a second apart: (tag, answered, failed) between them."""
    found = Fleet()
    for tag, answered, failed in rows:
        found.admit(report(tag, 0, 100, 3), 10.0)
        found.admit(report(tag, 1, 100 + answered, 3 + failed), 10.5)
    return found


def well_then(*later):
    """Two replicas that answer all of 100 requests; then reports of (tag, requests, failed, time)."""
    found = Fleet()
    for tag in ("a", "b"):
        found.admit(report(tag, 0, 0, 0), 9.0)
        found.admit(report(tag, 1, 100, 0), 10.0)
    for tag, requests, failed, at_s in later:
        found.admit(report(tag, 2, requests, failed), at_s)
    return found


def test_failures_on_every_replica_are_an_outage():
    alarm = fleet(("a", 30, 30), ("b", 40, 20)).outage("base", 11.0)
    assert (alarm.scope, alarm.cause) == ("global", "failures")
    assert alarm.statistic == pytest.approx(50 / 120)


def test_failures_on_one_replica_alone_name_it():
    assert fleet(("a", 100, 0), ("b", 10, 40)).outage("base", 11.0).scope == "replica:b"


def test_few_failures_and_old_ones_are_no_outage():
    assert fleet(("a", 100, 5), ("b", 100, 4)).outage("base", 11.0) is None
    assert fleet(("a", 1000, 25), ("b", 1000, 25)).outage("base", 11.0) is None
    assert fleet(("a", 30, 30), ("b", 40, 20)).outage("base", 30.0) is None
    assert Fleet().outage("base", 1.0) is None


def test_a_replica_that_starts_counts_from_its_first_report():
    found = Fleet()
    found.admit(report("a", 0, 0, 50), 10.0)  # failures before it was first heard of are not news
    assert found.outage("base", 10.0) is None


def test_a_repeated_report_does_not_count_its_failures_twice():
    found = fleet(("a", 5, 15))
    found.admit(report("a", 1, 105, 18), 10.6)
    assert found.outage("base", 11.0) is None
    assert found.repeated == 1


def test_the_first_replica_to_report_an_outage_is_not_blamed_before_the_others_were_heard():
    first = ("a", 150, 50, 10.5)
    assert well_then(first).outage("base", 10.6) is None
    assert well_then(first, ("b", 150, 50, 10.9)).outage("base", 11.0).scope == "global"


def test_a_replica_that_fails_while_the_others_stay_silent_is_named_all_the_same():
    assert well_then(("a", 200, 100, 10.5)).outage("base", 14.0).scope == "replica:a"


def test_reports_of_two_processes_of_one_replica_are_counted_once_in_any_order():
    found = Fleet()
    sent = [("i0", 1), ("i1", 1), ("i0", 1), ("i1", 1), ("i0", 2), ("i0", 2), ("i1", 2), ("i1", 1)]
    counted = [found.admit(replace(report("a", sequence, 0, 0), incarnation=name), 10.0) for name, sequence in sent]
    assert counted == [True, True, False, False, True, False, True, False]
    assert found.repeated == 4
    assert [view.incarnation for view in found.views(10.0)] == ["i1"]


def test_a_loss_is_still_reported_after_a_restart():
    found = Fleet()
    for name, sequence in (("i0", 1), ("i0", 5), ("i1", 0)):
        found.admit(replace(report("a", sequence, 0, 0), incarnation=name), 10.0)
    assert found.lost_reports() == 3
