"""A feed runs on the graph of its sizes, which is opened once, by whoever needs it first."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from attn_deploy.dispatch import Dispatcher
from attn_deploy.errors import AttnDeployError, FeedError, UsageError
from attn_deploy.manifest import Graph
from attn_deploy.session import DimBounds, TensorSpec


def graph(side: int, words: int) -> Graph:
    inputs = (
        TensorSpec("x", "float32", ("batch", 3, side, side)),
        TensorSpec("ids", "int64", ("batch", words)),
    )
    return Graph(inputs, (), {"batch": DimBounds(1, 4)}, {})


GRAPHS = {"8x8-5": graph(8, 5), "16x16-7": graph(16, 7)}


class Named:
    """A session that answers with its graph's name."""

    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False
        self.inputs = self.outputs = ()

    def run(self, feeds: Any) -> Any:
        return {"name": self.name}

    def close(self) -> None:
        self.closed = True


class Opening:
    """Counts what is opened; the opening of a graph in `blocked` waits until it is set free."""

    def __init__(self) -> None:
        self.opened: list[Named] = []
        self.blocked: dict[str, threading.Event] = {}
        self.begun = threading.Event()

    def __call__(self, name: str) -> Any:
        self.begun.set()
        if name in self.blocked:
            assert self.blocked[name].wait(20)
        self.opened.append(Named(name))
        return self.opened[-1]


@pytest.fixture
def opening() -> Opening:
    return Opening()


@pytest.fixture
def dispatcher(opening: Opening) -> Dispatcher:
    return Dispatcher(GRAPHS, opening)


def feeds(side: int, words: int, batch: int = 2) -> dict[str, Any]:
    return {"x": np.zeros((batch, 3, side, side), np.float32), "ids": np.zeros((batch, words), np.int64)}


def test_each_graph_is_opened_by_its_first_feed_and_stays_open(dispatcher: Dispatcher, opening: Opening) -> None:
    assert opening.opened == []
    assert dispatcher.run(feeds(16, 7)) == {"name": "16x16-7"}
    assert [s.name for s in opening.opened] == ["16x16-7"]
    for _ in range(2):
        assert dispatcher.run(feeds(8, 5, batch=1)) == {"name": "8x8-5"}
        assert dispatcher.run(feeds(16, 7, batch=4)) == {"name": "16x16-7"}
    assert [s.name for s in opening.opened] == ["16x16-7", "8x8-5"]


def test_many_threads_open_a_graph_once(dispatcher: Dispatcher, opening: Opening) -> None:
    sizes = [(8, 5), (16, 7)] * 20
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda size: dispatcher.run(feeds(*size))["name"], sizes))
    assert answers == ["8x8-5", "16x16-7"] * 20
    assert sorted(s.name for s in opening.opened) == ["16x16-7", "8x8-5"]


def test_one_graph_runs_while_another_is_being_opened(dispatcher: Dispatcher, opening: Opening) -> None:
    free = opening.blocked["16x16-7"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dispatcher.run, feeds(16, 7))
        assert opening.begun.wait(20)
        try:
            assert dispatcher.run(feeds(8, 5)) == {"name": "8x8-5"}
            assert not waiting.done()
        finally:
            free.set()
        assert waiting.result(20) == {"name": "16x16-7"}


def test_an_opening_that_failed_is_tried_again() -> None:
    errors = [AttnDeployError("the model is damaged")]

    def opening(name: str) -> Any:
        if errors:
            raise errors.pop()
        return Named(name)

    dispatcher = Dispatcher(GRAPHS, opening)
    with pytest.raises(AttnDeployError, match="damaged"):
        dispatcher.run(feeds(8, 5))
    assert dispatcher.run(feeds(8, 5)) == {"name": "8x8-5"}


def test_closed_frees_what_was_opened_and_opens_nothing_more(dispatcher: Dispatcher, opening: Opening) -> None:
    dispatcher.run(feeds(8, 5))
    dispatcher.close()
    assert [s.closed for s in opening.opened] == [True]
    with pytest.raises(AttnDeployError, match="the session is closed"):
        dispatcher.run(feeds(16, 7))
    assert len(opening.opened) == 1


def test_what_was_being_opened_when_it_was_closed_is_freed(dispatcher: Dispatcher, opening: Opening) -> None:
    free = opening.blocked["16x16-7"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dispatcher.run, feeds(16, 7))
        assert opening.begun.wait(20)
        dispatcher.close()
        free.set()
        waiting.result(20)
    assert [s.closed for s in opening.opened] == [True]


@pytest.mark.parametrize(("side", "words"), [(12, 5), (8, 7), (16, 5)])
def test_sizes_that_no_graph_takes_are_told_with_those_that_are_taken(
    side: int, words: int, dispatcher: Dispatcher, opening: Opening
) -> None:
    with pytest.raises(FeedError, match="no graph of the bundle takes these sizes") as caught:
        dispatcher.run(feeds(side, words))
    assert str(caught.value.got) == f"x: [2, 3, {side}, {side}]; ids: [2, {words}]"
    assert "8x8-5 (x: float32[batch, 3, 8, 8]; ids: int64[batch, 5])" in str(caught.value.expected)
    assert "16x16-7" in str(caught.value.expected)
    assert "one more --input" in str(caught.value.next_step)
    assert opening.opened == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((3, 7), np.int64)}, "dimension 'batch' differs"),
        ({"ids": np.zeros((2, 7), np.int32)}, "input 'ids' has the wrong dtype"),
        ({"words": np.zeros((2, 7), np.int64)}, "not the model's inputs"),
        ({"x": np.zeros((3, 16, 16), np.float32), "ids": np.zeros(7, np.int64)}, "array\\[None\\]"),
    ],
)
def test_another_fault_of_a_feed_is_told_as_by_a_single_graph(
    change: dict[str, Any], message: str, dispatcher: Dispatcher
) -> None:
    with pytest.raises(FeedError, match=message):
        dispatcher.run({**feeds(16, 7), **change})


def test_a_batch_out_of_the_graph_s_bounds_is_refused(dispatcher: Dispatcher) -> None:
    with pytest.raises(FeedError, match="out of the bundle's bounds"):
        dispatcher.run(feeds(16, 7, batch=5))


class OnGpu:
    """A tensor in GPU memory, as far as it is looked at here."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = shape, "torch.float32"

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


class NamedOnGpu(Named):
    def run_device(self, feeds: Any, *, stream: Any = None) -> Any:
        return {"name": self.name, "x": feeds["x"], "stream": stream}


def test_tensors_in_gpu_memory_run_on_the_graph_of_their_sizes_without_a_copy() -> None:
    x = OnGpu(2, 3, 16, 16)
    dispatcher = Dispatcher(GRAPHS, NamedOnGpu)
    assert dispatcher.run_device({**feeds(16, 7), "x": x}, stream=7) == {"name": "16x16-7", "x": x, "stream": 7}
    with pytest.raises(FeedError, match="no graph of the bundle"):
        dispatcher.run_device({**feeds(16, 7), "x": OnGpu(2, 3, 8, 9)})


def test_a_graph_that_is_not_on_a_gpu_says_which_target_is(dispatcher: Dispatcher) -> None:
    with pytest.raises(UsageError, match="does not run on a GPU") as caught:
        dispatcher.run_device(feeds(8, 5))
    assert "target='tensorrt'" in str(caught.value.next_step)


def test_what_is_no_mapping_is_refused(dispatcher: Dispatcher) -> None:
    with pytest.raises(FeedError, match="not a mapping"):
        dispatcher.run([np.zeros((2, 3, 8, 8), np.float32)])  # type: ignore[arg-type]
