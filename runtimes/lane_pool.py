"""A pool of lanes: what runs one call at a time each, at most a few at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.cuda_device import DeviceMemoryError

LANES = 2
"""Of each kind. A GPU gains little from more calls at a time (one copies while the other computes), and every lane
costs memory for activations."""


class Closable(Protocol):
    def close(self) -> None: ...


LaneT = TypeVar("LaneT", bound=Closable)


class LanePool(Generic[LaneT]):
    """Lanes by kind, made when first needed and kept. A call that finds none free waits for one."""

    def __init__(self, make: Callable[[Hashable], LaneT]) -> None:
        """`make(kind)` gives a new lane. Where it raises DeviceMemoryError the pool stays at the lanes it has."""
        self._make = make
        self._changed = threading.Condition()
        self._idle: dict[Hashable, list[LaneT]] = {}
        self._made: dict[Hashable, int] = {}
        self._most: dict[Hashable, int] = {}
        self._closed = False

    @contextlib.contextmanager
    def take(self, kind: Hashable) -> Iterator[LaneT]:
        """A lane of this kind, for this thread alone. Raises AttnDeployError once the pool is closed."""
        lane = self._acquire(kind)
        try:
            yield lane
        finally:
            with self._changed:
                self._idle[kind].append(lane)
                self._changed.notify_all()

    def _acquire(self, kind: Hashable) -> LaneT:
        while True:
            with self._changed:
                idle = self._idle.setdefault(kind, [])
                while not self._closed and not idle and self._made.get(kind, 0) >= self._most.get(kind, LANES):
                    self._changed.wait()
                if self._closed:
                    raise AttnDeployError("the session is closed", next_step="load the bundle again")
                if idle:
                    return idle.pop()
                self._made[kind] = self._made.get(kind, 0) + 1
            lane = self._try_to_make(kind)
            if lane is not None:
                return lane

    def _try_to_make(self, kind: Hashable) -> LaneT | None:
        """None where memory holds no more lanes than there are: one of those is to be waited for."""
        try:
            return self._make(kind)
        except BaseException as error:
            with self._changed:
                self._made[kind] -= 1
                others = self._made[kind]
                if others and isinstance(error, DeviceMemoryError):
                    self._most[kind] = others
                self._changed.notify_all()
            if others and isinstance(error, DeviceMemoryError):
                return None
            raise

    def close(self) -> None:
        """No call begins any more; those that run end normally; then every lane is closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while any(len(self._idle.get(kind, ())) < made for kind, made in self._made.items()):
                self._changed.wait()
            lanes = [lane for idle in self._idle.values() for lane in idle]
            self._idle.clear()
            self._made.clear()
        for lane in lanes:
            lane.close()
