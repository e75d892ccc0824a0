"""Live display of a sweep: one line per finished trial and, in a terminal, one live line for all."""

import atexit
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from rld_lightning.console import console, duration, print_line
from rld_lightning.errors import printable
from rld_lightning.runs.events import Events

LOOK = 0.3  # seconds between reads of the events


class LiveProgress:
    """Prints the events of a sweep's trials until :meth:`stop`; restores the terminal whichever process ends it.

    Attributes:
        failed: number of failed trials.
    """

    def __init__(self, sweep: Path) -> None:
        self._events = Events(sweep)
        self._total = 0
        self._running: dict[int, float] = {}  # start time by trial
        self._known: set[int] = set()
        self._seconds: list[float] = []
        self._ended = 0
        self._at_once = 1
        self._best: tuple[float, str] | None = None
        self.failed = 0
        self._over = threading.Event()
        self._live = Live(get_renderable=self._text, console=console, refresh_per_second=2, transient=True)
        self._thread = threading.Thread(target=self._refresh, daemon=True, name="watch-sweep")
        if console.is_terminal:
            self._live.start()
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Prints the last events."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        self._live.stop()
        self._process_new()

    def _refresh(self) -> None:
        while not self._over.wait(LOOK):
            self._process_new()

    def _text(self) -> Text:
        return Text.assemble(("   sweep", "bold"), printable(f"  {self.line()}"), no_wrap=True, overflow="ellipsis")

    def _process_new(self) -> None:
        with suppress(OSError):  # retried at the next read
            for event in self._events.new():
                with suppress(KeyError, TypeError, ValueError, AttributeError):  # for example from another version
                    self.process(event)

    def process(self, event: dict[str, Any]) -> None:
        """Processes an event: the number of trials, a trial's start, or its end."""
        if (total := event.get("total")) is not None:
            self._total = total
        elif event["state"] == "begins":
            self._running[event["number"]] = event["time"]
            self._known |= {event["number"]} if event["known"] else set()
            self._at_once = max(self._at_once, len(self._running))
        else:
            seconds = event["time"] - self._running.pop(event["number"], event["time"])
            self._ended += 1
            text = f"{self._ended}/{self._total}  {event['trial']}"
            if event.get("error") is not None:
                self.failed += 1
                first = event["error"].partition(". ")[0]  # the full message is printed at the sweep's end
                print_line("failed", f"{text}: {first}")
                return
            known = event["number"] in self._known  # finished in an earlier session: takes no time
            if not known:
                self._seconds.append(seconds)
            if self._best is None or event["top1"] > self._best[0]:
                self._best = event["top1"], event["trial"]
            early = f", ended after epoch {event['ended_after']}" if "ended_after" in event else ""  # pruned
            print_line(
                "trial", f"{text}  {event['top1']:.2f} %{early}  {'already done' if known else duration(seconds)}"
            )

    def line(self, now: float | None = None) -> str:
        """Returns the numbers of finished, running and failed trials, the time left, and the best so far."""
        parts = [f"{self._ended - self.failed}/{self._total} done", f"{len(self._running)} running"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self._seconds:
            parts.append(f"{duration(self._left(now))} left")
        if self._best is not None:
            parts.append(f"best {self._best[0]:.2f} %: {self._best[1]}")
        return ", ".join(parts)

    def _left(self, now: float | None) -> float:
        now = time.time() if now is None else now
        mean = sum(self._seconds) / len(self._seconds)
        waiting = self._total - self._ended - len(self._running)
        running = sum(max(0.0, mean - (now - began)) for began in self._running.values())
        return (mean * waiting + running) / self._at_once
