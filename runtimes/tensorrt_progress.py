"""TensorRT's nested build phases as one share of the work that is done."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from attn_deploy.progress import Progress, Silent

STEPS = 1000
"""What progress is counted in: phases have other numbers of steps in every version."""

_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("engine_progress", default=None)


@contextlib.contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Engines that are built inside report to `progress`: a build takes minutes, an open from the cache none."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Progress:
    return _current.get() or Silent()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """Which phases run, and how much of the outermost one is done. TensorRT reports from several threads.

    A phase of n steps counts its children as parts of the step that is running. Names are unique among the phases that
    run at one time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._running: dict[str, _Phase] = {}
        self._shown = -1

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            if parent is None:
                self._progress.stage(f"building the engine: {name}")
                self._shown = -1
            self._running[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, done: int) -> None:
        """`done` counts from 0: the first step has ended."""
        with self._lock:
            phase = self._running.get(name)
            if phase is not None:
                phase.done = max(phase.done, min(done + 1, phase.steps))
            self._show()

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._running.get(name)
            if phase is not None and phase.parent is None:
                phase.done = phase.steps
                self._show()
            self._running.pop(name, None)

    def _show(self) -> None:
        """Reports what grew: parallel phases could otherwise make a bar jump back."""
        share = max((self._share(n) for n, p in self._running.items() if p.parent is None), default=0.0)
        shown = int(share * STEPS)
        if shown > self._shown:
            self._shown = shown
            self._progress.step(shown, STEPS)

    def _share(self, name: str) -> float:
        phase = self._running[name]
        inner = [self._share(child) for child, p in self._running.items() if p.parent == name]
        part = sum(inner) / len(inner) if inner and phase.done < phase.steps else 0.0
        return (phase.done + part) / phase.steps
