"""Times of single nodes over many calls: a session of ONNX Runtime on the CPU that records every call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from attn_deploy.runtimes import RunNode
from attn_deploy.runtimes.onnxruntime import cpu_settings, create_session, profiled_nodes
from attn_deploy.session import Array


class ProfiledSession:
    """The session that a variant is opened with, weights prepacked, and every call of it in a profile; a context
    manager. What recording costs, some microseconds, is in the time of every node."""

    def __init__(self, model: Path, *, threads: int, library: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        settings = cpu_settings(threads, library)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(self._folder.name) / "profile")
        try:
            self._session: Any = create_session(model, settings)
        except BaseException:
            self._folder.cleanup()
            raise

    def run(self, feeds: Mapping[str, Array]) -> None:
        self._session.run(None, feeds)

    def finish(self) -> list[list[RunNode]]:
        """The nodes of each call since the session was opened, both in the order of the run. Ends the recording."""
        return nodes_by_call(json.loads(Path(self._session.end_profiling()).read_text()))

    def __enter__(self) -> ProfiledSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None
        self._folder.cleanup()


def nodes_by_call(events: Sequence[Mapping[str, Any]]) -> list[list[RunNode]]:
    """The events of a profile split at the end of each call."""
    calls: list[list[RunNode]] = []
    began = 0
    for place, event in enumerate(events):
        if event.get("cat") == "Session" and event["name"] == "model_run":
            calls.append(profiled_nodes(events[began:place]))
            began = place + 1
    return calls
