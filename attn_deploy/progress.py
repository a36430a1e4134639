"""How long work tells where it is: the pipeline reports, the command line shows."""

from __future__ import annotations

from typing import Protocol

from attn_deploy.receipt import MAIN


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


class _OfGraph:
    """Names the graph that a stage is about."""

    def __init__(self, progress: Progress, graph: str) -> None:
        self._progress = progress
        self._graph = graph
        self.step = progress.step

    def stage(self, name: str) -> None:
        self._progress.stage(f"{self._graph}: {name}")


def of_graph(progress: Progress, graph: str) -> Progress:
    """The progress of one graph among several; that of a bundle's only graph as it is."""
    return progress if graph == MAIN else _OfGraph(progress, graph)
