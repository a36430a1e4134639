"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def stage(self, name: str) -> None:
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=None)

    def step(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total or None)

    def stop(self) -> None:
        self._progress.stop()


class _Lines:
    """One line for each stage, with the time it took when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name: str | None = None
        self._began_s = 0.0

    def stage(self, name: str) -> None:
        self.stop()
        self._name, self._began_s = name, time.monotonic()

    def step(self, done: int, total: int) -> None:
        return None

    def stop(self) -> None:
        if self._name is not None:
            took_s = time.monotonic() - self._began_s
            self._console.print(f"{self._name}: {took_s:.1f} s", highlight=False, markup=False)
        self._name = None


@contextlib.contextmanager
def progress_on(console: Console) -> Iterator[_Bars | _Lines]:
    """Shows stages and steps for as long as the block runs."""
    if not console.is_terminal:
        lines = _Lines(console)
        try:
            yield lines
        finally:
            lines.stop()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress)
