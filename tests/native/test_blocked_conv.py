"""Convolutions on ONNX Runtime's blocked layout, with all that they take in, against float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_runner import Case, KernelRunner
from test_activate import REFERENCES, enumerators

from attn_deploy.ops import DOMAIN, VERSION
from attn_deploy.runtimes import native

Array = np.ndarray
OpenModel = Callable[..., onnxruntime.InferenceSession]
ACTIVATIONS = ("", "Relu", "Silu", "Hardswish", "Gelu")
EPSILON = 2.0**-24


def blocks(runner: KernelRunner) -> tuple[int, ...]:
    """The block sizes that ONNX Runtime can have where the instruction set is the widest."""
    return (16,) if runner.isa == "avx512" else (8, 16)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def activated(activation: str, v: Array) -> Array:
    return REFERENCES[activation or "None"](v.astype(np.float64))


def number(activation: str) -> int:
    return enumerators().index(activation or "None")


def tolerance(terms: int, magnitude: Array) -> Array:
    """Of a sum of `terms` products, magnitude the sum of their absolute values, behind a smooth activation."""
    return (terms + 4) * EPSILON * magnitude + 1e-6


def pointwise_sum(x: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """([out blocks, pixels, block], the same of absolute values) of x [in blocks, pixels, block], weight [out blocks,
    in blocks, block, block], in float64."""
    x, weight, bias = (a.astype(np.float64) for a in (x, weight, bias))
    made = np.einsum("cpi,ocij->opj", x, weight) + bias[:, None]
    return made, np.einsum("cpi,ocij->opj", abs(x), abs(weight)) + abs(bias)[:, None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pointwise_kernel(kernel_runner: KernelRunner, activation: str) -> None:
    """Each number of output blocks and pixels that a tile can have, more of them, and several slices of channels."""
    rng = np.random.default_rng(0)
    cases = []
    for block in blocks(kernel_runner):
        sizes = [(1, out, pixels) for out in (1, 2, 3, 4, 5, 7) for pixels in (1, 5, 6, 7, 13, 14, 15, 31)]
        sizes += [(3, 1, 29), (9, 5, 13), (17, 2, 7)]
        for index, (into, out, pixels) in enumerate(sizes):
            gates = [index & 1, index >> 1 & 1, index >> 2 & 1]
            inputs = [normal(rng, into, pixels, block), normal(rng, out, into, block, block), normal(rng, out, block)]
            inputs += [normal(rng, into, block)] if gates[0] else []
            inputs += [normal(rng, out, block)] if gates[1] else []
            inputs += [normal(rng, out, pixels, block)] if gates[2] else []
            per_call = (pixels, 10, 3)[index % 3]
            cases.append(
                Case(
                    "blocked_pointwise", inputs, [number(activation), *gates, per_call],
                    misalignments=[1 + i % 3 for i in range(len(inputs))],
                )
            )  # fmt: skip
    for case, (y,) in zip(cases, kernel_runner(cases), strict=True):
        x, weight, bias, *rest = case.inputs
        _, input_gate, output_gate, residual, _ = case.ints
        if input_gate:
            x = x.astype(np.float64) * rest.pop(0)[:, None]
        total, magnitude = pointwise_sum(x, weight, bias)
        if output_gate:
            gate = rest.pop(0).astype(np.float64)[:, None]
            total, magnitude = total * gate, magnitude * abs(gate)
        if residual:
            added = rest.pop(0).astype(np.float64)
            total, magnitude = total + added, magnitude + abs(added)
        terms = x.shape[0] * x.shape[2]
        assert (np.abs(y - activated(activation, total)) <= 1.2 * tolerance(terms, magnitude)).all()


def test_ranges_of_pixels_change_no_bit(kernel_runner: KernelRunner) -> None:
    rng = np.random.default_rng(1)
    block = blocks(kernel_runner)[-1]
    inputs = [normal(rng, 9, 41, block), normal(rng, 5, 9, block, block), normal(rng, 5, block), normal(rng, 9, block)]
    cases = [Case("blocked_pointwise", inputs, [number("Silu"), 1, 0, 0, pixels]) for pixels in (41, 1, 6, 17)]
    first, *others = (y for (y,) in kernel_runner(cases))
    assert all(np.array_equal(first, other) for other in others)


def test_numbers_that_are_none_come_through(kernel_runner: KernelRunner) -> None:
    block = blocks(kernel_runner)[-1]
    x = np.ones((1, 15, block), np.float32)
    x[0, 3, 2], x[0, 14, 5] = np.nan, np.inf
    inputs = [x, np.ones((5, 1, block, block), np.float32), np.zeros((5, block), np.float32)]
    ((y,),) = kernel_runner([Case("blocked_pointwise", inputs, [number(""), 0, 0, 0, 15])])
    assert np.isnan(y[:, 3]).all()
    assert np.isposinf(y[:, 14]).all()
    assert (np.delete(y, [3, 14], axis=1) == block).all()


def depthwise_sum(x: Array, weight: Array, bias: Array, stride: int, pads: tuple[int, int, int, int]) -> Array:
    """[out height, out width, block] of x [height, width, block] and weight [taps, taps, block], in float64."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    top, left, bottom, right = pads
    padded = np.pad(x, ((top, bottom), (left, right), (0, 0)))
    taps = weight.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (taps, taps), axis=(0, 1))[::stride, ::stride]
    made: Array = np.einsum("hwbij,ijb->hwb", windows, weight) + bias
    return made


# taps, stride, height, width, pads (top, left, bottom, right)
WINDOWS = (
    (3, 1, 7, 7, (1, 1, 1, 1)), (3, 2, 8, 9, (1, 1, 1, 1)), (3, 2, 7, 16, (0, 0, 1, 1)), (5, 1, 7, 7, (2, 2, 2, 2)),
    (5, 2, 14, 11, (2, 2, 2, 2)), (5, 2, 6, 6, (1, 1, 2, 2)), (1, 1, 3, 2, (0, 0, 0, 0)), (2, 1, 4, 5, (0, 0, 0, 0)),
    (7, 1, 3, 3, (3, 3, 3, 3)), (15, 1, 2, 17, (7, 7, 7, 7)), (3, 1, 1, 1, (1, 1, 1, 1)), (3, 1, 5, 33, (2, 0, 0, 3)),
)  # fmt: skip


@pytest.mark.parametrize("expands", [False, True], ids=["alone", "expanded"])
@pytest.mark.parametrize("activation", ["", "Relu", "Silu"])
def test_depthwise_kernel(kernel_runner: KernelRunner, activation: str, expands: bool) -> None:
    rng = np.random.default_rng(0)
    cases, all_pads = [], []
    for block, (taps, stride, height, width, pads), rows in product(blocks(kernel_runner), WINDOWS, (100, 2)):
        out_height = (height + pads[0] + pads[2] - taps) // stride + 1
        out_width = (width + pads[1] + pads[3] - taps) // stride + 1
        inputs = [normal(rng, height, width, block)]
        if expands:
            inputs = [normal(rng, 3, height, width, block), normal(rng, 3, block, block) / 4, normal(rng, block)]
        inputs += [normal(rng, taps, taps, block), normal(rng, block)]
        ints = [number(activation), stride, pads[0], pads[1], out_height, out_width, rows]
        cases.append(Case("blocked_depthwise", inputs, ints, misalignments=[1, 2, 3, 1, 2][: len(inputs)]))
        all_pads.append(pads)
    for case, pads, (y, sums) in zip(cases, all_pads, kernel_runner(cases), strict=True):
        *before, weight, bias = case.inputs
        if expands:
            x, expand_weight, expand_bias = before
            count, height, width, block = x.shape
            made, _ = pointwise_sum(x.reshape(count, height * width, block), expand_weight[None], expand_bias[None])
            before = [activated(activation, made[0]).reshape(height, width, block)]
        expected = activated(activation, depthwise_sum(before[0], weight, bias, case.ints[1], pads))
        magnitude = depthwise_sum(abs(before[0]), abs(weight), abs(bias), case.ints[1], pads)
        room = tolerance(weight.shape[0] ** 2 + (48 if expands else 0), magnitude)
        assert (np.abs(y - expected) <= 2 * room).all()
        np.testing.assert_allclose(sums.sum(0), y.astype(np.float64).sum((0, 1)), rtol=1e-5, atol=1e-4)


# -- as operators ----------------------------------------------------------------------------------------------------


def node_model(operator: str, inputs: list[str], *, outputs: int = 1, **attributes: int) -> bytes:
    made = [f"y{number}" for number in range(outputs)]
    node = onnx.helper.make_node(operator, inputs, made, domain=DOMAIN, name="block/conv", **attributes)
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in (*inputs, *made)]
    graph = onnx.helper.make_graph([node], "one", info[: len(inputs)], info[len(inputs) :])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def the_block(library: Path) -> int:
    return 16 if native.library_instruction_set(library).startswith("avx512") else 8


def feeds_of(block: int) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {
        "x": normal(rng, 2, 2 * block, 9, 8), "weight": normal(rng, block, 2 * block, 1, 1),
        "bias": normal(rng, block), "gate": normal(rng, 2, 2 * block, 1, 1),
    }  # fmt: skip


def test_any_number_of_threads_gives_the_same_bits(open_model: OpenModel, library: Path) -> None:
    block = the_block(library)
    rng = np.random.default_rng(3)
    wide = {
        "x": normal(rng, 3, 2 * block, 40, 37), "weight": normal(rng, 5 * block, 2 * block, 1, 1),
        "bias": normal(rng, 5 * block), "gate": normal(rng, 3, 2 * block, 1, 1),
    }  # fmt: skip
    pointwise = node_model("BlockedPointwiseInputGateSilu", list(wide), block=block, channels=5 * block - 3)
    taps = {
        "x": wide["x"], "expand_weight": wide["weight"], "expand_bias": wide["bias"],
        "weight": normal(rng, 5 * block, 1, 3, 3), "bias": wide["bias"],
    }  # fmt: skip
    depthwise = node_model(
        "BlockedExpandDepthwisePoolSilu", list(taps), outputs=2, block=block, channels=5 * block, stride=2, pad_top=1,
        pad_left=1, pad_bottom=1, pad_right=1,
    )  # fmt: skip
    for model, feeds in ((pointwise, wide), (depthwise, taps)):
        found = [open_model(model, library=library, threads=n).run(None, feeds) for n in (1, 2, 3, 8)]
        assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_pool_is_the_mean_of_the_map(open_model: OpenModel, library: Path) -> None:
    block = the_block(library)
    rng = np.random.default_rng(4)
    feeds = {"x": normal(rng, 2, block, 30, 31), "weight": normal(rng, block, 1, 3, 3), "bias": normal(rng, block)}
    model = node_model(
        "BlockedDepthwisePoolRelu", list(feeds), outputs=2, block=block, channels=block, stride=1, pad_top=1,
        pad_left=1, pad_bottom=1, pad_right=1,
    )  # fmt: skip
    y, mean = open_model(model, library=library).run(None, feeds)
    by_channel = y.reshape(2, 30 * 31, block).astype(np.float64).mean(1)
    np.testing.assert_allclose(mean.reshape(2, block), by_channel, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": (2, 3, 9, 8)}, ["x has shape", "channels in blocks of"]),
        ({"weight": (1, 1)}, ["weight has shape"]),
        ({"bias": (1,)}, ["bias has shape"]),
        ({"gate": (1, 1, 1, 1)}, ["input_gate has shape"]),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_with_the_nodes_name(
    open_model: OpenModel, library: Path, change: Mapping[str, tuple[int, ...]], parts: list[str]
) -> None:
    block = the_block(library)
    model = node_model("BlockedPointwiseInputGate", list(feeds_of(block)), block=block, channels=block)
    session = open_model(model, library=library)
    feeds = feeds_of(block)
    session.run(None, feeds)
    with pytest.raises(Exception, match="BlockedPointwiseInputGate node 'block/conv'") as refused:
        session.run(None, {**feeds, **{name: np.ones(shape, np.float32) for name, shape in change.items()}})
    assert all(part in str(refused.value) for part in parts)


@pytest.mark.parametrize("attributes", [{"stride": 3}, {"pad_left": -1}, {"block": 4}])
def test_attributes_out_of_range_are_refused(
    open_model: OpenModel, library: Path, attributes: Mapping[str, int]
) -> None:
    block = the_block(library)
    given = {"block": block, "channels": block, "stride": 1, **dict.fromkeys(("pad_top", "pad_left"), 1)}
    given |= {"pad_bottom": 1, "pad_right": 1} | dict(attributes)
    model = node_model("BlockedDepthwise", ["x", "weight", "bias"], **given)
    with pytest.raises(Exception, match="BlockedDepthwise node 'block/conv'"):
        open_model(model, library=library)


def test_a_window_beyond_the_map_is_refused(open_model: OpenModel, library: Path) -> None:
    block = the_block(library)
    pads = {"pad_top": 0, "pad_left": 0, "pad_bottom": 0, "pad_right": 0}
    model = node_model("BlockedDepthwise", ["x", "weight", "bias"], block=block, channels=block, stride=1, **pads)
    session = open_model(model, library=library)
    feeds = {"x": (1, block, 2, 2), "weight": (block, 1, 3, 3), "bias": (block,)}
    with pytest.raises(Exception, match="expected a window of 1 to 15 inside the map"):
        session.run(None, {name: np.ones(shape, np.float32) for name, shape in feeds.items()})
