"""Old and new side by side: a sample of what was answered is answered again by another version, off the request path.

Called by `Healable`. A thread of its own runs the other version on a few requests at a time; what does not fit into
its short queue is not compared. Only instances that the two answer differently are kept, until the next report.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.messages import Disagreement
from serve_app.forward import Answer, Ask, Runner
from serve_app.observer import own

MAX_ROWS = 64  # of one request that are compared, and of all that wait
MAX_KEPT = 2_000  # disagreements that wait for a report; the surplus is dropped and counted
FREE_SHARE = 0.05  # of a GPU's memory that must be free, or nothing is compared

log = logging.getLogger("rayheal")


class Shadow:
    """Compares what is served with another version.

    Args:
        runner: runs a module on this replica's device.
        find: the module of a version in memory, or None.
        device: the replica's.
    """

    def __init__(self, runner: Runner, find: Callable[[str], nn.Module | None], device: torch.device) -> None:
        self.compared = 0  # instances, since this process began
        self.dropped = 0
        self.problem = ""  # why nothing is compared; empty when all is well
        self._runner, self._find, self._device = runner, find, device
        self._against, self._share = "", 0.0
        self._changed = threading.Condition()
        self._queue: deque[tuple[Ask, Answer]] = deque()
        self._rows = 0
        self._found: deque[Disagreement] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False

    def aim(self, against: str, share: float) -> None:
        """Compare a share of the requests with this version from now on; "" for none."""
        with self._changed:
            if (against, share) == (self._against, self._share):
                return
            self._against, self._share = against, share
            self._queue.clear()
            self._rows = 0
            if against and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
                self._thread.start()

    def offer(self, ask: Ask, answer: Answer) -> None:
        """Perhaps compare an answered request; never waits."""
        if not self._share or not ask.monitor or ask.version is not None or random.random() >= self._share:
            return
        with self._changed:
            rows = min(len(ask.inputs), MAX_ROWS)
            if not self._against or answer.digest == self._against or self._rows + rows > MAX_ROWS:
                return
            self._queue.append((replace(ask, inputs=own(ask.inputs[:MAX_ROWS])), answer))
            self._rows += rows
            self._changed.notify()

    def take(self) -> tuple[Disagreement, ...]:
        """Disagreements since the last call."""
        with self._changed:
            found, self._found = tuple(self._found), deque()
        return found

    def close(self) -> None:
        """End the thread after the pass under way."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                work, self._queue = list(self._queue), deque()
                self._rows, against = 0, self._against
            try:
                self._say(self._why_not())
                if not self.problem:
                    self._compare(work, against)
            except Exception as error:  # comparing must not end unseen, and never concerns a request
                self._say(f"{type(error).__name__}: {error}")

    def _why_not(self) -> str:
        if self._device.type != "cuda":
            return ""
        free, total = torch.cuda.mem_get_info(self._device)
        return f"free GPU memory {free / total:.3f} < {FREE_SHARE}" if free < FREE_SHARE * total else ""

    def _compare(self, work: list[tuple[Ask, Answer]], against: str) -> None:
        module = self._find(against)
        if module is None:  # not loaded yet, or retired meanwhile
            return
        asks = [ask for ask, _ in work]
        with torch.inference_mode():
            other_N = self._runner.run(module, asks).logits.float().argmax(dim=1).cpu().numpy()
        start = 0
        for ask, (_, answer) in zip(asks, work, strict=True):
            stop = start + len(ask.inputs)
            self._keep(answer, _classes(answer.logits)[: stop - start], other_N[start:stop], against)
            start = stop
        with self._changed:
            self.compared += start

    def _keep(self, answer: Answer, own_N: np.ndarray, other_N: np.ndarray, against: str) -> None:
        """One disagreement of a request at most, by lot: its rows are of one place and time, no bets of their own."""
        differ = np.flatnonzero(own_N != other_N)
        if len(differ) == 0:
            return
        i = int(random.choice(differ))
        pair = Disagreement(answer.ids[i], answer.digest, int(own_N[i]), against, int(other_N[i]))
        with self._changed:
            if len(self._found) < MAX_KEPT:
                self._found.append(pair)
            else:
                self.dropped += 1

    def _say(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("versions are not compared: %s", problem)
        self.problem = problem


def _classes(logits: Any) -> np.ndarray:
    if isinstance(logits, torch.Tensor):
        logits = logits.detach().float().cpu().numpy()
    return np.asarray(np.asarray(logits).argmax(axis=1))
