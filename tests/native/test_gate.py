"""The Gate kernel's numbers, against float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from kernel_runner import Case, KernelRunner
from test_activate import enumerators

from attn_deploy.ops import FORMS

RunGate = Callable[..., np.ndarray]
Feeds = dict[str, np.ndarray]
Shape = tuple[int, ...]

GATE_FORMS = [name for name, form in FORMS.items() if form.operator == "Gate"]

GATE_SHAPES: dict[str, Callable[[int, int, int, int], Shape]] = {
    "per-channel": lambda n, c, h, w: (n, c, 1, 1),
    "per-channel-one-batch": lambda n, c, h, w: (1, c, 1, 1),
    "per-pixel": lambda n, c, h, w: (n, 1, h, w),
    "per-pixel-one-batch": lambda n, c, h, w: (1, 1, h, w),
    "per-row": lambda n, c, h, w: (n, c, h, 1),
    "per-column": lambda n, c, h, w: (n, c, 1, w),
    "one-number": lambda n, c, h, w: (1, 1, 1, 1),
    "full": lambda n, c, h, w: (n, c, h, w),
}

# Height * width is 1, 7, 8, 9, 15, 16, 17, 49, 196: around the lengths of vectors, and maps at the end of a CNN.
MAPS = [(1, 1), (7, 1), (2, 4), (3, 3), (5, 3), (4, 4), (1, 17), (7, 7), (14, 14)]


def random_feeds(form: str, x_shape: Shape, gate_shape: Shape, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    shapes = {"x": x_shape, "gate": gate_shape, "residual": x_shape}
    return {i.name: 3 * rng.standard_normal(shapes[i.name], dtype=np.float32) for i in FORMS[form].inputs}


def assert_close(form: str, feeds: Feeds, output: np.ndarray) -> None:
    """Allowed: a float32 rounding of each term of the sum, which no activation amplifies by more than 1.1, and 1e-6 of
    the result for silu."""
    magnitude = np.abs(feeds["x"].astype(np.float64) * feeds["gate"])
    if "residual" in feeds:
        magnitude = magnitude + np.abs(feeds["residual"])
    (expected,) = FORMS[form].reference(*feeds.values())
    allowed = 1.1 * np.finfo(np.float32).eps * magnitude + 1e-6 * np.abs(expected)
    assert output.dtype == np.float32
    assert output.shape == feeds["x"].shape
    assert (np.abs(output - expected) <= allowed).all()


@pytest.mark.parametrize("gate_kind", GATE_SHAPES)
@pytest.mark.parametrize("form", GATE_FORMS)
def test_equals_the_reference_at_every_size(run_gate: RunGate, form: str, gate_kind: str) -> None:
    for (height, width), channels, batch in product(MAPS, (1, 3, 17), (1, 2, 3)):
        shape = (batch, channels, height, width)
        feeds = random_feeds(form, shape, GATE_SHAPES[gate_kind](*shape))
        assert_close(form, feeds, run_gate(form, feeds))


@pytest.mark.parametrize("gate_kind", GATE_SHAPES)
@pytest.mark.parametrize("form", GATE_FORMS)
def test_large_tensors_give_the_same_bits_on_any_number_of_threads(
    run_gate: RunGate, form: str, gate_kind: str
) -> None:
    shape = (3, 17, 43, 41)  # 89,913 elements: split, and into pieces that start and end inside rows
    feeds = random_feeds(form, shape, GATE_SHAPES[gate_kind](*shape))
    one_thread = run_gate(form, feeds, threads=1)
    assert_close(form, feeds, one_thread)
    for threads in (2, 3):
        np.testing.assert_array_equal(run_gate(form, feeds, threads=threads), one_thread)


@pytest.mark.parametrize("rank", range(1, 9))
def test_every_rank_and_every_choice_of_broadcast_dims(run_gate: RunGate, rank: int) -> None:
    shape = (3, 2, 4, 1, 2, 3, 2, 5)[:rank]
    for mask in product((True, False), repeat=rank):
        gate_shape = tuple(1 if broadcast else dim for broadcast, dim in zip(mask, shape, strict=True))
        feeds = random_feeds("GateResidualRelu", shape, gate_shape)
        assert_close("GateResidualRelu", feeds, run_gate("GateResidualRelu", feeds))


@pytest.mark.parametrize(
    ("x_shape", "gate_shape"),
    [((0, 3, 4, 4), (1, 3, 1, 1)), ((0, 3, 4, 4), (0, 3, 1, 1)), ((2, 3, 0, 4), (2, 3, 1, 1)), ((0,), (1,))],
)
def test_an_empty_input_gives_an_empty_output(run_gate: RunGate, x_shape: Shape, gate_shape: Shape) -> None:
    for form in GATE_FORMS:
        assert run_gate(form, random_feeds(form, x_shape, gate_shape)).shape == x_shape


def form_name(activation: str, residual: bool) -> str:
    return "Gate" + ("Residual" if residual else "") + activation


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["", "Relu", "Silu"])
def test_every_instruction_set_misalignment_and_cut_into_ranges(
    kernel_runner: KernelRunner, activation: str, residual: bool
) -> None:
    form = form_name(activation, residual)
    number = enumerators().index(activation or "None")
    cases, given = [], []
    for seed, (kind, size, misalignment) in enumerate(product(GATE_SHAPES, (1, 3, 5, 16, 17, 33), (0, 1, 3))):
        shape = (2, 3, size, 2 * size - 1)
        feeds = random_feeds(form, shape, GATE_SHAPES[kind](*shape), seed)
        off = [misalignment] * len(feeds)
        whole, pieces = (Case("gate", list(feeds.values()), [number, n], misalignments=off) for n in (1, 7))
        cases += [whole, pieces]
        given.append(feeds)
    outputs = [output for (output,) in kernel_runner(cases)]
    for feeds, whole, pieces in zip(given, outputs[::2], outputs[1::2], strict=True):
        assert_close(form, feeds, whole)
        np.testing.assert_array_equal(pieces, whole)


def silu_float64(v: np.ndarray) -> np.ndarray:
    """v / (1 + exp(-v)), written so that neither side of 0 overflows or cancels."""
    v = v.astype(np.float64)
    tail = np.exp(-np.abs(v))
    return v * np.where(v < 0, tail, 1.0) / (1.0 + tail)


def test_silu_is_accurate_to_1e_6_until_its_tail_is_0(run_gate: RunGate) -> None:
    small = np.logspace(-37, 0, 20_000)
    v = np.concatenate([np.linspace(-120, 120, 400_001), small, -small, [3e38, -3e38, 0.0]]).astype(np.float32)
    output = run_gate("GateSilu", {"x": v, "gate": np.ones(1, np.float32)})
    expected = silu_float64(v)
    # exp(-v) ends at the largest float: from there on silu, 3e-37 and less, is 0.
    allowed = np.maximum(1e-6 * np.abs(expected), 4e-37)
    assert (np.abs(output - expected) <= allowed).all()


@pytest.mark.parametrize("form", GATE_FORMS)
def test_nan_and_infinities_come_through(run_gate: RunGate, form: str) -> None:
    inf, nan = np.inf, float(np.uint32(0x7FC00001).view(np.float32))  # a NaN with more than one bit of payload
    x = [inf, -inf, nan, 3e38, -3e38, 0.0, inf]
    gate = [1.0, 1.0, 1.0, 10.0, 10.0, 1.0, 0.0]
    unbounded = [inf, -inf, nan, inf, -inf, 0.0, nan]
    rectified = [inf, 0.0, nan, inf, 0.0, 0.0, nan]  # silu's limit at -infinity is 0 too
    expected = rectified if form.endswith(("Relu", "Silu")) else unbounded

    def repeated(values: list[float]) -> np.ndarray:
        """So often that each value also lands in what is left over after whole vectors."""
        return np.tile(np.array(values, np.float32), 5)

    feeds = {"x": repeated(x), "gate": repeated(gate)}
    if "Residual" in form:
        feeds["residual"] = np.zeros_like(feeds["x"])
    np.testing.assert_array_equal(run_gate(form, feeds), repeated(expected))


def test_one_session_serves_eight_threads_at_once(run_gate: RunGate) -> None:
    form = "GateResidualSilu"
    all_feeds = [random_feeds(form, (1 + seed % 3, 16, 40, 40), (1, 16, 1, 1), seed) for seed in range(8)]
    alone = [run_gate(form, feeds, threads=2) for feeds in all_feeds]

    def run_often(worker: int) -> bool:
        return all(np.array_equal(run_gate(form, all_feeds[worker], threads=2), alone[worker]) for _ in range(20))

    with ThreadPoolExecutor(8) as workers:
        assert all(workers.map(run_often, range(8)))
