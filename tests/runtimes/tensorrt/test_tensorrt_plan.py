"""Engines that cannot be opened: which version they need, and what to do; multiply-adds; progress of a build."""

from __future__ import annotations

import threading

import pytest

from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.runtimes.cuda_device import DeviceMemoryError
from attn_deploy.runtimes.tensorrt_plan import is_plan, plan_version, unusable
from attn_deploy.runtimes.tensorrt_progress import STEPS, Phases, current, shown_by
from attn_deploy.runtimes.tensorrt_work import attention_work, convolution_work, deconvolution_work, product_work


def plan(major: int, minor: int, patch: int, build: int, layout: int = 0) -> bytes:
    """The first bytes of a plan, as trtexec --getPlanVersionOnly reads them."""
    return b"ftrt" + layout.to_bytes(4, "little") + bytes(16) + bytes([major, minor, patch, build]) + b"rest"


def test_a_plan_says_which_version_wrote_it() -> None:
    assert plan_version(plan(10, 3, 0, 26)) == (10, 3, 0, 26)
    assert is_plan(plan(10, 3, 0, 26))


@pytest.mark.parametrize("content", [b"", b"ftrt", b"\x08\x0a\x12onnx" * 9, plan(11, 4, 0, 1, layout=7)])
def test_what_is_no_known_plan_has_no_version(content: bytes) -> None:
    assert plan_version(content) is None


REASON = AttnDeployError("TensorRT cannot open the engine", got="magic tag does not match")


def test_an_engine_of_another_version_names_both_and_the_command() -> None:
    error = unusable(plan(10, 3, 0, 26), REASON, "11.4.0.106", where="vit.engine")
    assert isinstance(error, UnavailableError)
    assert error.exit_code == 6
    assert "10.3.0.26" in str(error.got)
    assert "11.4.0.106" in str(error.expected)
    assert "pip install 'tensorrt==10.3.0.*'" in str(error.next_step)
    assert error.where == "vit.engine"


def test_an_engine_of_the_same_version_was_built_for_another_gpu() -> None:
    error = unusable(plan(11, 4, 0, 106), REASON, "11.4.0.106")
    assert isinstance(error, UnavailableError)
    assert "GPU" in error.what
    assert error.got == REASON.got


def test_what_is_no_engine_is_said_to_be_none() -> None:
    assert "no TensorRT engine" in unusable(b"something else entirely, and long", REASON, "11.4.0").what


def test_memory_that_ran_out_stays_that_error() -> None:
    full = DeviceMemoryError("full")
    assert unusable(plan(10, 3, 0, 26), full, "11.4.0") is full


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (product_work((2, 5, 3), (2, 5, 7)), 2 * 5 * 7 * 3),
        (product_work((2, 3, 5), (2, 5, 7)), 2 * 5 * 7 * 3),  # the first operand is read transposed
        (product_work((5, 3), (5,)), 15),
        (product_work((3,), (7,)), 21),
        (product_work((3,), ()), 3),
        (product_work((-1, 3), (-1, 7)), 0),
        (convolution_work((2, 8, 8, 8), (2, 16, 6, 6), (3, 3), 1), 2 * 16 * 36 * 8 * 9),
        (convolution_work((2, 8, 8, 8), (2, 8, 6, 6), (3, 3), 8), 2 * 8 * 36 * 9),
        (convolution_work((2, 8, 32), (2, 16, 30), (3,), 1), 2 * 16 * 30 * 8 * 3),
        (deconvolution_work((1, 8, 4, 4), (1, 16, 8, 8), (2, 2), 1), 8 * 16 * 16 * 4),
        (attention_work((2, 4, 10, 16), (2, 4, 12, 16), (2, 4, 12, 8)), 2 * 4 * 10 * 12 * (16 + 8)),
        (attention_work((2, 4, 10, 16), (2, 1, 12, 16), (2, 1, 12, 16)), 2 * 4 * 10 * 12 * 32),
        (attention_work((2, 4, -1, 16), (2, 4, 12, 16), (2, 4, 12, 16)), 0),
    ],
)
def test_multiply_adds(work: int, expected: int) -> None:
    assert work == expected


class Shown:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps: list[int] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def step(self, done: int, total: int) -> None:
        assert total == STEPS
        self.steps.append(done)


def test_inner_phases_are_parts_of_the_running_step() -> None:
    shown = Shown()
    phases = Phases(shown)
    phases.start("engine", None, 2)
    phases.start("tactics", "engine", 4)
    phases.step("tactics", 0)
    phases.step("tactics", 1)
    phases.finish("tactics")
    phases.step("engine", 0)
    phases.step("engine", 1)
    phases.finish("engine")
    assert shown.stages == ["building the engine: engine"]
    assert shown.steps == [125, 250, 500, 1000]


def test_progress_never_goes_back() -> None:
    shown = Shown()
    phases = Phases(shown)
    phases.start("engine", None, 2)
    phases.start("a", "engine", 2)
    phases.step("a", 0)
    phases.start("b", "engine", 2)  # halves the share of what runs
    phases.step("b", 0)
    phases.finish("engine")
    assert shown.steps == sorted(shown.steps)
    assert shown.steps[-1] == STEPS


def test_phases_may_be_reported_by_several_threads() -> None:
    shown = Shown()
    phases = Phases(shown)
    phases.start("engine", None, 400)

    def report(first: int) -> None:
        for step in range(first, first + 100):
            phases.step("engine", step)

    threads = [threading.Thread(target=report, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown.steps == sorted(set(shown.steps))
    assert shown.steps[-1] == STEPS


def test_progress_is_shown_by_what_is_named_around_the_call() -> None:
    shown = Shown()
    with shown_by(shown):
        assert current() is shown
    current().stage("nothing")  # outside nothing is shown
    assert shown.stages == []
