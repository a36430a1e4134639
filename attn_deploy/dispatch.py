"""A bundle of several graphs as one model: each feed runs on the graph of its sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from attn_deploy.errors import AttnDeployError, FeedError, UsageError
from attn_deploy.manifest import Graph
from attn_deploy.session import Array, DeviceSession, FeedChecker, Session, TensorSpec, as_array, on_gpu


class Dispatcher:
    """Opens a graph when it is first needed. Safe to call from many threads at once: they wait only for the opening of
    the graph that they need themselves."""

    def __init__(self, graphs: Mapping[str, Graph], open_graph: Callable[[str], Session]) -> None:
        self._graphs = dict(graphs)
        self._checkers = {name: FeedChecker(graph.inputs, graph.dims) for name, graph in graphs.items()}
        self._open_graph = open_graph
        self._sessions: dict[str, Session] = {}
        self._locks = {name: threading.Lock() for name in graphs}
        self._closed = False

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Raises FeedError: what `FeedChecker` raises, and sizes that no graph takes."""
        name = self.graph_for(feeds)
        checked = self._checkers[name].check(feeds)
        return self._session(name).run(checked)

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, Any]:
        """As DeviceSession has it. Raises FeedError as `run` does, UsageError where the graph is not on a GPU."""
        name = self.graph_for(feeds)
        checked = self._checkers[name].check(feeds, device=True)
        return require_device(self._session(name)).run_device(checked, stream=stream)

    def graph_for(self, feeds: Mapping[str, Any]) -> str:
        """The graph that takes inputs of these sizes; the first one where another thing than a size is wrong, so that
        its check tells."""
        first, graph = next(iter(self._graphs.items()))
        if not isinstance(feeds, Mapping) or feeds.keys() != {spec.name for spec in graph.inputs}:
            return first
        shapes = {
            name: tuple(value.shape) if on_gpu(value) else as_array(name, value).shape for name, value in feeds.items()
        }
        found = self._taking(shapes)
        if found is None:
            self._raise_sizes(shapes)
        return found or first

    def close(self) -> None:
        """Frees the models. Calls that are running end normally."""
        self._closed = True
        for session in list(self._sessions.values()):
            session.close()

    def _taking(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        for name, graph in self._graphs.items():
            if all(_fits(spec, shapes[spec.name]) for spec in graph.inputs):
                return name
        return None

    def _session(self, name: str) -> Session:
        session = self._sessions.get(name)
        if session is not None:
            return session
        with self._locks[name]:
            if self._closed:
                raise AttnDeployError("the session is closed", next_step="load the bundle again")
            if name not in self._sessions:
                self._sessions[name] = self._open_graph(name)
            session = self._sessions[name]
        if self._closed:  # while it was being opened
            session.close()
        return session

    def _raise_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        advice = "resize or pad it to one of these, or export again with one more --input for these sizes"
        if self._taking({name: (1, *shape) for name, shape in shapes.items()}) is not None:
            advice = "if the batch is what is missing: array[None]"
        raise FeedError(
            "no graph of the bundle takes these sizes",
            got="; ".join(f"{name}: {list(shape)}" for name, shape in shapes.items()),
            expected=" or ".join(
                f"{name} ({'; '.join(spec.describe() for spec in graph.inputs)})"
                for name, graph in self._graphs.items()
            ),
            next_step=advice,
        )


def require_device(session: Session) -> DeviceSession:
    """Raises UsageError for a session that is not on a GPU."""
    if not isinstance(session, DeviceSession):
        raise UsageError(
            "the variant does not run on a GPU", got="run_device", expected="a variant for a GPU",
            next_step="load it with target='tensorrt' or target='onnxruntime-cuda', or call run",
        )  # fmt: skip
    return session


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(spec.shape) == len(shape) and all(
        isinstance(expected, str) or expected == size for expected, size in zip(spec.shape, shape, strict=True)
    )
