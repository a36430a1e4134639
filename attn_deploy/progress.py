"""How long work tells where it is: the pipeline reports, the command line shows."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """`total` 0 means unknown."""

    def stage(self, name: str) -> None:
        """A new stage begins; the one before it has ended."""

    def step(self, done: int, total: int) -> None:
        """Progress within the stage."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str) -> None:
        return None

    def step(self, done: int, total: int) -> None:
        return None
