"""The closed loop on a running service: drift, alarm, trials, gate, canary, roll; and back when the world returns."""

from __future__ import annotations

import json
from collections.abc import Callable

import ray
from conftest import Service, Traffic, wait_for
from desk import Desk

from orchestrator.actor import actor_name
from orchestrator.settings import NAMESPACE


def _ready(service: Service) -> bool:
    state = service.state()
    return len(state["replicas"]) == 2 and bool(state["drift"])


def _drift_until_searching(service: Service, stream: Traffic) -> None:
    wait_for(lambda: _ready(service) and len(stream.answers) > 60, 120, "two reporting replicas and clean traffic")
    assert service.state()["phase"] == "watching"
    stream.drift = True
    wait_for(lambda: service.state()["phase"] == "searching", 90, "a search")


def _healed(service: Service) -> bool:
    state = service.state()
    return state["phase"] == "watching" and state["stable"] != "base"


def test_orchestrator_killed_while_trials_run_and_the_service_heals_all_the_same(
    start_service: Callable[..., Service], traffic: Callable[[Service], Traffic]
) -> None:
    desk = Desk()
    service = start_service("killed", notify=desk.url)
    stream = traffic(service)
    _drift_until_searching(service, stream)
    handle = ray.get_actor(actor_name("killed"), NAMESPACE)
    ray.kill(handle, no_restart=False)
    wait_for(lambda: _healed(service), 240, "the heal")
    state = service.state()
    wait_for(lambda: len(stream.answers) > 0 and stream.accuracy() > 0.9, 60, "the accuracy to come back")
    assert all(r["generation"] == state["generation"] for r in state["replicas"] if r["live"])
    assert stream.failures == []

    stream.drift = False
    wait_for(lambda: service.state()["stable"] == "base", 120, "the base to come back with the old world")
    assert stream.failures == []

    restored = "the traffic looks like the reference again: base restored"
    desk.wait(lambda: any(restored in body.decode() for _, body in desk.taken))
    told = [json.loads(body) for _, body in desk.taken]
    healed = "io.rayheal.episode.healed"
    assert (told[0]["type"], told[0]["subject"], told[-1]["type"]) == (healed, "e0001", healed)
    numbers = [int(headers["webhook-id"].rpartition("/")[2]) for headers, _ in desk.taken]
    assert numbers == sorted(set(numbers)), "in order, and each once, though the orchestrator was killed"
    desk.close()


def test_orchestrator_removed_for_good_is_made_again_by_the_replicas(
    start_service: Callable[..., Service], traffic: Callable[[Service], Traffic]
) -> None:
    service = start_service("removed")
    stream = traffic(service)
    wait_for(lambda: _ready(service), 120, "two reporting replicas")
    ray.kill(ray.get_actor(actor_name("removed"), NAMESPACE), no_restart=True)

    def back() -> bool:
        try:
            ray.get_actor(actor_name("removed"), NAMESPACE)
        except ValueError:
            return False
        return True

    wait_for(back, 60, "a new orchestrator")
    wait_for(lambda: _ready(service), 60, "its replicas")
    assert stream.failures == []
