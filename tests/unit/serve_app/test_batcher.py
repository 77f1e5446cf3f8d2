"""Batches gather who was answered just now, keep order and bounds, and lose nobody."""

from __future__ import annotations

import asyncio

import numpy as np

from serve_app.batcher import Batcher, Outcome
from serve_app.forward import Answer, Ask


def ask(name: str, rows: int = 1) -> Ask:
    return Ask(np.zeros((rows, 2)), name)


class Pass:
    """A forward pass that takes a turn of the clock, or fails."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[str]] = []
        self.rows: list[int] = []
        self._seconds = seconds

    async def __call__(self, asks: list[Ask]) -> list[Outcome]:
        self.batches.append([a.request_id for a in asks])
        self.rows.append(sum(len(a.inputs) for a in asks))
        await asyncio.sleep(self._seconds)
        if any(a.request_id == "bad" for a in asks):
            raise RuntimeError("bad")
        return [Answer(None, 0, "base", a.request_id) for a in asks]


def test_request_alone_runs_at_once_and_gets_its_own_answer() -> None:
    async def scenario() -> None:
        run = Pass()
        batcher = Batcher(run, 8)
        for number in range(3):
            outcome = await batcher.submit(ask(f"r{number}"))
            assert isinstance(outcome, Answer)
            assert outcome.request_id == f"r{number}"
        assert run.batches == [["r0"], ["r1"], ["r2"]]

    asyncio.run(scenario())


def test_batches_keep_the_order_and_the_limit() -> None:
    async def scenario() -> None:
        run = Pass()
        batcher = Batcher(run, 8)
        sizes = [3, 4, 2, 8, 1, 5, 3]
        outcomes = await asyncio.gather(*(batcher.submit(ask(f"r{i}", n)) for i, n in enumerate(sizes)))
        assert [o.request_id for o in outcomes if isinstance(o, Answer)] == [f"r{i}" for i in range(7)]
        assert [name for batch in run.batches for name in batch] == [f"r{i}" for i in range(7)]
        assert max(run.rows) <= 8

    asyncio.run(scenario())


def test_clients_that_ask_again_meet_in_one_batch() -> None:
    async def scenario() -> None:
        run = Pass(0.4)
        batcher = Batcher(run, 32)

        async def client(number: int) -> None:
            for turn in range(5):
                await batcher.submit(ask(f"c{number}t{turn}"))
                await asyncio.sleep(0.001 * number)  # they come back one after the other

        await asyncio.gather(*(client(number) for number in range(8)))
        assert [len(batch) for batch in run.batches] == [8] * 5

    asyncio.run(scenario())


def test_failed_pass_is_everybodys_outcome_and_the_next_batch_runs() -> None:
    async def scenario() -> None:
        batcher = Batcher(Pass(), 8)
        outcomes = await asyncio.gather(batcher.submit(ask("good")), batcher.submit(ask("bad")))
        assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)
        assert isinstance(await batcher.submit(ask("next")), Answer)

    asyncio.run(scenario())


def test_client_that_hung_up_is_not_run_and_its_neighbours_are() -> None:
    async def scenario() -> None:
        run = Pass(0.01)
        batcher = Batcher(run, 8)
        first = asyncio.create_task(batcher.submit(ask("first")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gone = asyncio.create_task(batcher.submit(ask("gone")))
        stays = asyncio.create_task(batcher.submit(ask("stays")))
        await asyncio.sleep(0)
        gone.cancel()
        outcomes = await asyncio.gather(first, stays)
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        assert "gone" not in [name for batch in run.batches for name in batch]

    asyncio.run(scenario())
