"""The pool of lanes: at most a few at once, memory that runs out, closing while calls run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import pytest

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.cuda_device import DeviceMemoryError
from attn_deploy.runtimes.lane_pool import LANES, LanePool

WAIT_S = 30
"""Only a failing test waits this long."""


class Lane:
    def __init__(self, kind: Hashable) -> None:
        self.kind = kind
        self.closed = False

    def close(self) -> None:
        self.closed = True


def background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_lane_is_kept_for_the_next_call() -> None:
    pool = LanePool(Lane)
    with pool.take(0) as first:
        pass
    with pool.take(0) as second:
        assert second is first
    with pool.take(1) as other:
        assert other.kind == 1


def test_calls_at_the_same_time_have_lanes_of_their_own_up_to_the_limit() -> None:
    pool = LanePool(Lane)
    together = threading.Barrier(LANES + 1)
    used: list[Lane] = []

    def call() -> None:
        with pool.take(0) as lane:
            used.append(lane)
            together.wait(WAIT_S)

    threads = [background(call) for _ in range(LANES)]
    together.wait(WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    assert len(set(map(id, used))) == LANES


def test_a_further_call_waits_for_a_lane() -> None:
    pool = LanePool(Lane)
    got = threading.Event()
    with pool.take(0), pool.take(0):
        waiting = background(lambda: _take_once(pool, got))
        assert not got.wait(0.05)
    assert got.wait(WAIT_S)
    waiting.join(WAIT_S)


def _take_once(pool: LanePool[Lane], got: threading.Event) -> None:
    with pool.take(0):
        got.set()


def test_where_memory_holds_one_lane_the_second_call_waits_for_it() -> None:
    made: list[Lane] = []

    def make(kind: Hashable) -> Lane:
        if made:
            raise DeviceMemoryError("full")
        made.append(Lane(kind))
        return made[0]

    pool = LanePool(make)
    got = threading.Event()
    with pool.take(0):
        waiting = background(lambda: _take_once(pool, got))
        assert not got.wait(0.05)
    assert got.wait(WAIT_S)
    waiting.join(WAIT_S)
    assert len(made) == 1


def test_memory_that_holds_no_lane_is_an_error_and_the_pool_stays_usable() -> None:
    full = True

    def make(kind: Hashable) -> Lane:
        if full:
            raise DeviceMemoryError("full")
        return Lane(kind)

    pool = LanePool(make)
    with pytest.raises(DeviceMemoryError), pool.take(0):
        pass
    full = False
    with pool.take(0) as lane:
        assert lane.kind == 0


def test_another_error_of_making_is_raised_and_counts_no_lane() -> None:
    broken = iter([True] * (LANES + 1) + [False])

    def make(kind: Hashable) -> Lane:
        if next(broken):
            raise ValueError("broken")
        return Lane(kind)

    pool = LanePool(make)
    for _ in range(LANES + 1):
        with pytest.raises(ValueError, match="broken"), pool.take(0):
            pass
    with pool.take(0):
        pass


def test_an_error_of_a_call_gives_its_lane_back() -> None:
    pool = LanePool(Lane)
    for _ in range(LANES + 1):
        with pytest.raises(KeyError), pool.take(0):
            raise KeyError


def test_closing_waits_for_calls_that_run_and_refuses_later_ones() -> None:
    pool = LanePool(Lane)
    inside, leave, closed = threading.Event(), threading.Event(), threading.Event()
    held: list[Lane] = []

    def call() -> None:
        with pool.take(0) as lane:
            held.append(lane)
            inside.set()
            leave.wait(WAIT_S)

    running = background(call)
    assert inside.wait(WAIT_S)
    closing = background(lambda: (pool.close(), closed.set()))  # type: ignore[func-returns-value]
    assert not closed.wait(0.05)
    assert not held[0].closed
    leave.set()
    assert closed.wait(WAIT_S)
    running.join(WAIT_S)
    closing.join(WAIT_S)
    assert held[0].closed
    with pytest.raises(AttnDeployError, match="closed"), pool.take(0):
        pass
