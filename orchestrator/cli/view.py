"""What `heal demo` shows while it runs: a live panel on a terminal, plain lines anywhere else.

Knows only the state that `/healing` answers and the answers that the load received.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from orchestrator.cli.client import short
from orchestrator.cli.load import Sent

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # points of a sparkline
BESIDE = 24  # columns that the panel needs beside a sparkline
RECENT = 50  # requests that an accuracy is taken over
LINE_S = 5.0  # at least one plain line in this time
REFRESH_HZ = 2.0  # of the panel: more would take processor time from the trials


def sparkline(values: Sequence[float], top: float = 1.0, width: int = WIDTH) -> str:
    """The last `width` values as bars; `top` and above is a full one."""
    steps = len(BARS) - 1
    return "".join(BARS[min(steps, max(0, round(v / top * steps)))] for v in list(values)[-width:])


NOT_TESTED = "nothing is tested yet: no traffic since the start, or the model's baseline is still being measured"


def is_tested(state: dict[str, Any]) -> bool:
    """Whether any test has seen traffic: before that, no alarm says nothing."""
    drift = state.get("drift") or {}
    return bool(drift.get("scopes") or drift.get("alarm"))


def drift_level(state: dict[str, Any]) -> float:
    """The highest test's log-scaled statistic, an alarm at 1; 1 while an alarm stands."""
    drift = state.get("drift") or {}
    if drift.get("alarm"):
        return 1.0
    return max((float(scope["level"]) for scope in (drift.get("scopes") or {}).values()), default=0.0)


def recent_accuracy(sent: Sequence[Sent]) -> float | None:
    """Share of instances answered rightly in the last RECENT requests whose labels the client knows."""
    known = [s for s in sent[-RECENT:] if s.correct is not None]
    total = sum(len(s.rows) for s in known)
    return sum(s.correct or 0 for s in known) / total if total else None


class View:
    """Follows a demo. Use as a context manager; call `update` about twice a second.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._levels: deque[float] = deque(maxlen=WIDTH)
        self._accuracies: deque[float] = deque(maxlen=WIDTH)
        self._start_s = time.monotonic()
        self._said_s = float("-inf")
        self._said: tuple[Any, ...] = ()
        self._live = Live(console=console, refresh_per_second=REFRESH_HZ) if console.is_terminal else None

    def __enter__(self) -> View:
        """Start the panel."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last panel standing."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line of progress."""
        elapsed = Text(f"{time.monotonic() - self._start_s:6.1f} s  ", style="dim")
        self._console.print(elapsed + Text(text))

    def update(self, state: dict[str, Any], sent: Sequence[Sent], stream: str) -> None:
        """Show the newest state and answers."""
        self._levels.append(drift_level(state))
        accuracy = recent_accuracy(sent)
        if accuracy is not None:
            self._accuracies.append(accuracy)
        if self._live is not None:
            self._live.update(self._panel(state, sent, stream))
        else:
            self._line(state, sent, stream)

    def _line(self, state: dict[str, Any], sent: Sequence[Sent], stream: str) -> None:
        news = (state.get("phase"), state.get("generation"), stream)
        if news == self._said and time.monotonic() - self._said_s < LINE_S:
            return
        self._said, self._said_s = news, time.monotonic()
        accuracy = f"{self._accuracies[-1]:.2f}" if self._accuracies else "-"
        replicas = ", ".join(f"{r['generation']}:{short(r['digest'])}" for r in state.get("replicas", []))
        self.say(
            f"{state.get('phase', '?'):<12} drift {self._levels[-1]:4.2f}  {stream} accuracy {accuracy}"
            f"  requests {len(sent)}  replicas [{replicas}]"
        )

    def _panel(self, state: dict[str, Any], sent: Sequence[Sent], stream: str) -> RenderableType:
        top = Table.grid(padding=(0, 2))
        width = max(8, min(WIDTH, self._console.width - BESIDE))  # narrower: the newest bars, not the oldest
        level, accuracy = self._levels[-1], self._accuracies[-1] if self._accuracies else None
        top.add_row("phase", Text(str(state.get("phase", "?")), style="bold cyan"))
        top.add_row(
            "drift", Text(sparkline(self._levels, width=width), style="red" if level >= 1 else "green"), f"{level:.2f}"
        )
        shown = "-" if accuracy is None else f"{accuracy:.3f}"
        top.add_row("accuracy", Text(sparkline(self._accuracies, width=width), style="yellow"), shown)
        top.add_row("traffic", f"{stream}: {len(sent)} requests, {sum(1 for s in sent if s.error)} failed")
        parts: list[RenderableType] = [top, _replicas(state)]
        if trials := ((state.get("episode") or {}).get("search") or {}).get("trials"):
            parts.append(_trials(trials))
        if problem := state.get("problem"):
            parts.append(Text(str(problem), style="red"))
        title = f"heal demo  {time.monotonic() - self._start_s:.0f} s"
        return Panel(Group(*parts), title=title, border_style="blue")


def _replicas(state: dict[str, Any]) -> Table:
    table = Table("replica", "generation", "serves", "instances", "age", box=None)
    for row in state.get("replicas", []):
        name = str(row["replica"]).rsplit("#", 1)[-1][-12:]
        table.add_row(
            name, str(row["generation"]), short(row["digest"]), str(row["instances"]), f"{row['age_s']:.1f} s"
        )
    return table


def _trials(trials: Sequence[dict[str, Any]]) -> Table:
    table = Table("trial", "placement", "rank", "learning rate", "score", "status", box=None)
    for trial in trials:
        config = trial["config"]
        score = trial["score"]
        table.add_row(
            str(trial["trial_id"]),
            str(config["placement"]),
            str(config["adapter_rank"]),
            f"{config['learning_rate']:g}",
            score if isinstance(score, str) else f"{score:.3f}",
            str(trial["status"]),
        )
    return table
