"""Gathers requests into batches for a forward pass that runs elsewhere.

Called by `replica`, on its event loop. A pass on a CPU has a large fixed cost (a ResNet-18: 22 ms and 3 ms a row), and
whoever was answered just now asks again in a moment: taking at once what is there splits sixteen clients into a batch
of one and one of fifteen. So as many rows are awaited as were there around the last pass, for a part of its time;
alone, a request waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from serve_app.forward import Answer, Ask

PATIENCE = 0.25  # of the last pass's time, that rows are awaited at most

Outcome = Answer | Exception
Run = Callable[[list[Ask]], Awaitable[list[Outcome]]]


class Batcher:
    """One batch at a time, in order of arrival.

    Args:
        run: answers a batch, one outcome for each request.
        max_rows: of a batch; a request must not have more.
    """

    def __init__(self, run: Run, max_rows: int) -> None:
        self._run, self._max_rows = run, max_rows
        self._waiting: deque[tuple[Ask, asyncio.Future[Outcome]]] = deque()
        self._rows = 0  # waiting
        self._expected = 0  # rows that were there around the last pass
        self._took_s = self._ended_s = 0.0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, ask: Ask) -> Outcome:
        """The outcome of one request."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        self._waiting.append((ask, future))
        self._rows += len(ask.inputs)
        self._arrived.set()
        if self._worker is None:
            if loop.time() - self._ended_s > self._took_s:
                self._expected = 0  # they did not come back
            self._worker = loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                await self._gather()
                batch = self._take()
                start_s = loop.time()
                await self._answer(batch)
                self._ended_s = loop.time()
                self._took_s = self._ended_s - start_s
                self._expected = sum(len(ask.inputs) for ask, _ in batch) + self._rows
        finally:
            self._worker = None

    async def _gather(self) -> None:
        wanted = min(self._expected, self._max_rows)
        try:
            async with asyncio.timeout(self._took_s * PATIENCE):
                while self._rows < wanted:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return  # fewer came back: go on with those

    def _take(self) -> list[tuple[Ask, asyncio.Future[Outcome]]]:
        batch: list[tuple[Ask, asyncio.Future[Outcome]]] = []
        rows = 0
        while self._waiting and (not batch or rows + len(self._waiting[0][0].inputs) <= self._max_rows):
            ask, future = self._waiting.popleft()
            self._rows -= len(ask.inputs)
            if not future.done():  # a client that hung up is not answered
                batch.append((ask, future))
                rows += len(ask.inputs)
        return batch

    async def _answer(self, batch: list[tuple[Ask, asyncio.Future[Outcome]]]) -> None:
        if not batch:
            return
        try:
            outcomes = await self._run([ask for ask, _ in batch])
        except Exception as error:  # every request must get an outcome
            outcomes = [error] * len(batch)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)
