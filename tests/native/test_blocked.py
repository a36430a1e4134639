"""Kernels and operators on ONNX Runtime's blocked layout, against float64 NumPy on the plain layout."""

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
Attributes = Mapping[str, int]

PIXELS = (1, 2, 3, 4, 5, 31, 32, 33, 49, 197)
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


@pytest.mark.parametrize("per_pixel", [False, True], ids=["per-channel", "per-pixel"])
@pytest.mark.parametrize("activation", ["", "Relu", "Silu", "Hardswish"])
def test_gate_kernel(kernel_runner: KernelRunner, activation: str, per_pixel: bool) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for block, pixels, residual in product(blocks(kernel_runner), PIXELS, (False, True)):
        inputs = [normal(rng, pixels, block), normal(rng, pixels if per_pixel else block)]
        inputs += [normal(rng, pixels, block)] if residual else []
        cases.append(
            Case("blocked_gate", inputs, [number(activation), per_pixel], misalignments=[1, 2, 3][: 2 + residual])
        )
    for case, (y,) in zip(cases, kernel_runner(cases), strict=True):
        x, gate, *residual = (a.astype(np.float64) for a in case.inputs)
        product_ = x * (gate[:, None] if per_pixel else gate)
        expected = activated(activation, sum(residual, product_))
        magnitude = np.abs(product_) + sum(map(np.abs, residual))
        assert (np.abs(y - expected) <= 4 * EPSILON * magnitude + 4e-7 * np.abs(expected) + 2e-7).all()


@pytest.mark.parametrize("activation", ["Relu", "Silu", "Hardswish", "Gelu", "Sigmoid", "HardSigmoid"])
def test_activate_kernel_leaves_padding_0(kernel_runner: KernelRunner, activation: str) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for block, pixels in product(blocks(kernel_runner), PIXELS):
        for channels in {1, 3, block // 2, block - 1, block}:
            x = normal(rng, pixels, block)
            x[:, channels:] = 0
            cases.append(Case("blocked_activate", [x], [number(activation), channels], misalignments=[1]))
    for case, (y,) in zip(cases, kernel_runner(cases), strict=True):
        channels = case.ints[1]
        np.testing.assert_allclose(y[:, :channels], activated(activation, case.inputs[0][:, :channels]), 1e-6, 1e-6)
        assert not y[:, channels:].any()


def test_pool_kernel(kernel_runner: KernelRunner) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for block, pixels in product(blocks(kernel_runner), (*PIXELS, 3136)):
        for parts in {1, min(3, pixels)}:
            cases.append(Case("blocked_pool", [normal(rng, pixels, block) + 1], [parts], misalignments=[3]))
    for case, (mean,) in zip(cases, kernel_runner(cases), strict=True):
        exact = case.inputs[0].astype(np.float64)
        assert (np.abs(mean - exact.mean(0)) <= 64 * EPSILON * np.abs(exact).mean(0)).all()


def test_pool_of_large_planes_far_from_0_keeps_its_accuracy(kernel_runner: KernelRunner) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((112 * 112, 16), dtype=np.float32) * 0.01 + 100
    for (mean,) in kernel_runner([Case("blocked_pool", [x], [parts]) for parts in (1, 9)]):
        exact = x.astype(np.float64).mean(0)
        assert (np.abs(mean - exact) <= 4 * np.spacing(exact.astype(np.float32))).all()


@pytest.mark.parametrize(("channels", "reduced"), [(1, 1), (16, 4), (17, 3), (96, 7), (131, 33), (480, 20)])
def test_excite_kernels(kernel_runner: KernelRunner, channels: int, reduced: int) -> None:
    rng = np.random.default_rng(0)
    pooled, weight, bias = normal(rng, channels), normal(rng, reduced, channels), normal(rng, reduced)
    cases = [
        Case("excite_hidden", [pooled, weight, bias], [number("Relu"), rows], misalignments=[1, 2, 3])
        for rows in (reduced, 4, 3)
    ]
    expected = np.maximum(weight.astype(np.float64) @ pooled + bias, 0)
    allowed = 2e-6 * (np.abs(weight.astype(np.float64)) @ np.abs(pooled) + np.abs(bias))
    for (hidden,) in kernel_runner(cases):
        assert (np.abs(hidden - expected) <= allowed).all()

    panel, offset = normal(rng, reduced, 64) / 4, normal(rng, 64)
    hidden = normal(rng, reduced)
    widths = sorted({1, 5, 16, min(channels, 64), 63, 64})
    cases = [
        Case("excite_gate", [hidden, panel, offset], [number("Sigmoid"), w], misalignments=[1, 0, 0]) for w in widths
    ]
    expected = activated("Sigmoid", hidden.astype(np.float64) @ panel + offset)
    for width, (gate,) in zip(widths, kernel_runner(cases), strict=True):
        np.testing.assert_allclose(gate, expected[:width], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("taps", [1, 3, 5, 7])
def test_eca_kernel(kernel_runner: KernelRunner, taps: int) -> None:
    rng = np.random.default_rng(0)
    weight = normal(rng, taps)
    padded = [normal(rng, channels + taps - 1) for channels in (1, 4, 15, 16, 17, 64, 131)]
    cases = [Case("eca_gate", [p, weight], [number("Sigmoid")], misalignments=[1, 3]) for p in padded]
    for p, (gate,) in zip(padded, kernel_runner(cases), strict=True):
        expected = activated("Sigmoid", np.correlate(p.astype(np.float64), weight))
        np.testing.assert_allclose(gate, expected, rtol=1e-5, atol=1e-6)


# Operators, in ONNX Runtime, in the block size of this CPU's widest instruction set.


def to_blocked(x: Array, block: int) -> Array:
    """[N, C, H, W] -> the 4-D tensor [N, C padded, H, W] whose bytes are [N, C / block, H, W, block]."""
    n, c, h, w = x.shape
    padded = np.zeros((n, -(-c // block) * block, h, w), np.float32)
    padded[:, :c] = x
    return np.ascontiguousarray(padded.reshape(n, -1, block, h, w).transpose(0, 1, 3, 4, 2)).reshape(padded.shape)


def from_blocked(x: Array, block: int) -> Array:
    """All channels, padding too, in the plain layout."""
    n, c, h, w = x.shape
    return x.reshape(n, c // block, h, w, block).transpose(0, 1, 4, 2, 3).reshape(x.shape)


@pytest.fixture(scope="session")
def block(library: Path) -> int:
    isa = native.library_text(library, "attn_deploy_native_instruction_set")
    if isa == "none":
        pytest.skip("no instruction set of the library's here")
    return 16 if isa.startswith("avx512") else 8


def model_of(
    operator: str, attributes: Attributes, inputs: Mapping[str, Array], constants: Mapping[str, Array]
) -> bytes:
    node = onnx.helper.make_node(
        operator, [*inputs, *constants], ["output"], domain=DOMAIN, name="layer1/op", **attributes
    )
    graph = onnx.helper.make_graph(
        [node],
        "one_node",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inputs],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


@pytest.fixture
def run(open_model: OpenModel, library: Path) -> Callable[..., list[Array]]:
    """The outputs, after a comparison of 1, 2, 3 and 8 threads bit by bit."""

    def run(
        operator: str,
        attributes: Attributes,
        inputs: Mapping[str, Array],
        constants: Mapping[str, Array] | None = None,
    ) -> list[Array]:
        model = model_of(operator, attributes, inputs, constants or {})
        alone, *others = [open_model(model, library=library, threads=n).run(None, dict(inputs)) for n in (1, 2, 3, 8)]
        for other in others:
            for a, b in zip(alone, other, strict=True):
                np.testing.assert_array_equal(a, b)
        return alone

    return run


SHAPES = [(1, 3, 1, 1), (2, 24, 7, 7), (1, 32, 5, 9), (2, 40, 29, 31), (1, 16, 112, 112)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate_kind", ["channel", "channel-one-batch", "pixel", "pixel-one-batch"])
def test_gate_operator(run: Callable[..., list[Array]], block: int, shape: tuple[int, ...], gate_kind: str) -> None:
    rng = np.random.default_rng(0)
    n, c, h, w = shape
    gate = normal(
        rng, 1 if gate_kind.endswith("one-batch") else n, *((c, 1, 1) if "channel" in gate_kind else (1, h, w))
    )
    x, residual = normal(rng, *shape), normal(rng, *shape)
    inputs = {
        "x": to_blocked(x, block),
        "gate": to_blocked(gate, block) if "channel" in gate_kind else gate,
        "residual": to_blocked(residual, block),
    }
    (y,) = run("BlockedGateResidualRelu", {"block": block, "channels": c}, inputs)
    y = from_blocked(y, block)
    np.testing.assert_allclose(y[:, :c], np.maximum(x.astype(np.float64) * gate + residual, 0), rtol=1e-6, atol=2e-6)
    assert not y[:, c:].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation_and_pool_operators(run: Callable[..., list[Array]], block: int, shape: tuple[int, ...]) -> None:
    x = normal(np.random.default_rng(0), *shape)
    c = shape[1]
    attributes, inputs = {"block": block, "channels": c}, {"x": to_blocked(x, block)}
    (y,), (mean,) = run("BlockedActivateSilu", attributes, inputs), run("BlockedPool", attributes, inputs)
    np.testing.assert_allclose(from_blocked(y, block)[:, :c], activated("Silu", x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(mean[:, :c], x.mean((2, 3), np.float64, keepdims=True), rtol=1e-6, atol=1e-6)
    (gates,) = run("BlockedActivateSigmoid", attributes, inputs)
    np.testing.assert_allclose(from_blocked(gates, block)[:, :c], activated("Sigmoid", x), rtol=1e-6, atol=1e-6)
    for padded in (from_blocked(y, block), mean, from_blocked(gates, block)):
        assert not padded[:, c:].any()


@pytest.mark.parametrize(
    ("batch", "channels", "reduced"), [(1, 8, 1), (2, 72, 24), (1, 200, 10), (1, 1152, 48), (2, 512, 128)]
)
@pytest.mark.parametrize("form", ["ReluSigmoid", "SiluSigmoid", "ReluHardSigmoid", "HardswishHardSigmoid"])
def test_excite_operator(
    run: Callable[..., list[Array]], block: int, form: str, batch: int, channels: int, reduced: int
) -> None:
    rng = np.random.default_rng(0)
    hidden, gate = next((h, form.removeprefix(h)) for h in ("Relu", "Silu", "Hardswish") if form.startswith(h))
    pooled = normal(rng, batch, channels, 1, 1)
    constants = {
        "weight1": normal(rng, reduced, channels) / np.float32(channels**0.5),
        "bias1": normal(rng, reduced),
        "weight2": normal(rng, channels, reduced) / np.float32(reduced**0.5),
        "bias2": normal(rng, channels),
    }
    w1, b1, w2, b2 = (v.astype(np.float64) for v in constants.values())
    exact = activated(gate, activated(hidden, pooled[:, :, 0, 0].astype(np.float64) @ w1.T + b1) @ w2.T + b2)
    attributes = {"block": block, "channels": channels}
    (made,) = run(f"BlockedExcite{form}", attributes, {"pooled": to_blocked(pooled, block)}, constants)
    np.testing.assert_allclose(made[:, :channels, 0, 0], exact, rtol=2e-6, atol=2e-6)
    assert not made[:, channels:].any()


@pytest.mark.parametrize("taps", [1, 3, 5])
def test_eca_operator(run: Callable[..., list[Array]], block: int, taps: int) -> None:
    rng = np.random.default_rng(0)
    pooled, weight = normal(rng, 2, 37, 1, 1), normal(rng, taps)
    inputs, constants = {"pooled": to_blocked(pooled, block)}, {"weight": weight}
    (made,) = run("BlockedEca", {"block": block, "channels": 37}, inputs, constants)
    for sample, vector in zip(made[:, :, 0, 0], pooled[:, :, 0, 0], strict=True):
        exact = np.correlate(np.pad(vector.astype(np.float64), taps // 2), weight)
        np.testing.assert_allclose(sample[:37], activated("Sigmoid", exact), rtol=1e-6, atol=1e-6)
        assert not sample[37:].any()


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes", "said"),
    [
        ("BlockedGate", {"x": (1, 32, 4, 4), "gate": (1, 16, 1, 1)}, {}, r"gate has shape \[1,16,1,1\]"),
        ("BlockedGate", {"x": (1, 24, 4, 4), "gate": (1, 24, 1, 1)}, {}, r"x has shape \[1,24,4,4\]"),
        ("BlockedGateResidual", {"x": (1, 32, 4, 4), "gate": (1, 32, 1, 1), "residual": (1, 32, 4, 1)}, {}, "residual"),
        ("BlockedActivateSilu", {"x": (32, 4, 4)}, {}, r"x has shape \[32,4,4\]"),
        ("BlockedActivateSilu", {"x": (1, 32, 4, 4)}, {"block": 4}, "block is 4"),
        ("BlockedActivateSilu", {"x": (1, 32, 4, 4)}, {"channels": 0}, "channels is 0"),
        ("BlockedPool", {"x": (1, 32, 0, 4)}, {}, "expected pixels"),
        ("BlockedEca", {"pooled": (1, 32, 1, 1), "weight": (4,)}, {}, r"weight has shape \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_node_name(
    open_model: OpenModel,
    library: Path,
    block: int,
    operator: str,
    shapes: dict[str, tuple[int, ...]],
    attributes: Attributes,
    said: str,
) -> None:
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    model = model_of(operator, {"block": block, "channels": 32, **attributes}, feeds, {})
    with pytest.raises(Exception, match=rf"{operator} node 'layer1/op': .*{said}"):
        open_model(model, library=library).run(None, feeds)


def test_weights_that_are_no_constants_are_refused_at_load(open_model: OpenModel, library: Path, block: int) -> None:
    shapes = {"pooled": (1, 32, 1, 1), "weight1": (4, 32), "bias1": (4,), "weight2": (32, 4), "bias2": (32,)}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    model = model_of("BlockedExciteReluSigmoid", {"block": block, "channels": 32}, feeds, {})
    with pytest.raises(Exception, match="'layer1/op': weight1 is no constant"):
        open_model(model, library=library)
