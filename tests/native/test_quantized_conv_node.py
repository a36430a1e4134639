"""The operators on 8-bit maps in ONNX Runtime: kernel, function body and reference agree; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from attn_deploy.ops import BLOCK_FORMS
from attn_deploy.ops.quantized_conv import PADS

Array = np.ndarray[Any, Any]
MakeModel = Callable[..., bytes]
OpenModel = Callable[..., onnxruntime.InferenceSession]

CONVS = [name for name, form in BLOCK_FORMS.items() if form.operator in ("QuantizedConv", "QuantizedDepthwise")]
GATES = [name for name, form in BLOCK_FORMS.items() if form.operator == "QuantizedGate"]


def levels(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def scale(rng: np.random.Generator, *shape: int) -> Array:
    return (0.02 * np.exp(rng.standard_normal(shape))).astype(np.float32)


def zero(rng: np.random.Generator) -> Array:
    return rng.integers(0, 256, 1).astype(np.uint8)


def conv_case(name: str, seed: int = 0, channels: int = 19, batch: int = 2) -> tuple[dict[str, Array], ...]:
    """Feeds, constants and attributes."""
    rng = np.random.default_rng(seed)
    depthwise = BLOCK_FORMS[name].operator == "QuantizedDepthwise"
    out = channels if depthwise else 35
    pads = (1, 0, 2, 1)
    feeds = {"x": levels(rng, batch, 9, 12, channels)}
    constants = {
        "weight": rng.integers(1, 256, (out, 3, 3, 1 if depthwise else channels), dtype=np.uint8),
        "weight_scale": scale(rng, out), "bias": rng.standard_normal(out).astype(np.float32),
        "x_scale": scale(rng, channels if depthwise else 1), "x_zero": zero(rng),
        "y_scale": 10 * scale(rng, out), "y_zero": zero(rng),
    }  # fmt: skip
    if "Residual" in name:
        feeds["residual"] = levels(rng, batch, 10, 11, out)
        constants |= {"residual_scale": scale(rng, out), "residual_zero": zero(rng)}
    attributes: dict[str, Any] = dict(zip(PADS, pads, strict=True)) | ({"channels": channels} if depthwise else {})
    return feeds, constants, attributes


def gate_case(name: str) -> tuple[dict[str, Array], ...]:
    rng = np.random.default_rng(1)
    feeds = {"x": levels(rng, 2, 5, 7, 19), "gate": rng.random((2, 19, 1, 1), dtype=np.float32)}
    constants = {"x_scale": scale(rng, 19), "x_zero": zero(rng), "y_scale": scale(rng, 1), "y_zero": zero(rng)}
    if "Residual" in name:
        feeds["residual"] = levels(rng, 2, 5, 7, 19)
        constants |= {"residual_scale": scale(rng, 19), "residual_zero": zero(rng)}
    attributes: dict[str, Any] = {"channels": 19}
    return feeds, constants, attributes


def expected_of(name: str, feeds: dict[str, Array], constants: dict[str, Array], attributes: dict[str, Any]) -> Array:
    form = BLOCK_FORMS[name]
    operands = [(feeds | constants)[i.name] for i in form.inputs]
    (expected,) = form.reference(*operands, **attributes)
    assert form.infer_shapes(*(o.shape for o in operands), **attributes) == (expected.shape,)
    return expected


@pytest.mark.parametrize("name", [*CONVS, *GATES])
def test_kernel_and_body_agree_with_the_reference(
    make_model: MakeModel, open_model: OpenModel, library: Path, name: str
) -> None:
    """But for numbers that lie halfway between two levels."""
    feeds, constants, attributes = conv_case(name) if name in CONVS else gate_case(name)
    expected = expected_of(name, feeds, constants, attributes).astype(np.int64)
    for with_body in (False, True):
        model = make_model(name, attributes=attributes, constants=constants, with_body=with_body)
        (got,) = open_model(model, library=None if with_body else library).run(None, feeds)
        assert got.dtype == np.uint8
        assert got.shape == expected.shape
        error = np.abs(got.astype(np.int64) - expected)
        assert error.max() <= 1
        assert (error > 0).mean() < (0.03 if "Silu" in name else 2e-3)  # a rough exponential on AVX-512


def test_the_pool_is_the_mean_in_float(make_model: MakeModel, open_model: OpenModel, library: Path) -> None:
    rng = np.random.default_rng(2)
    feeds, constants = {"x": levels(rng, 2, 5, 7, 19)}, {"x_scale": scale(rng, 19), "x_zero": zero(rng)}
    attributes: dict[str, Any] = {"channels": 19}
    expected = expected_of("QuantizedChannelPool", feeds, constants, attributes)
    for with_body in (False, True):
        model = make_model("QuantizedChannelPool", attributes=attributes, constants=constants, with_body=with_body)
        (got,) = open_model(model, library=None if with_body else library).run(None, feeds)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["QuantizedConv", "QuantizedDepthwiseSilu"])
def test_any_number_of_threads_gives_the_same_bits(run_form: Callable[..., list[Array]], name: str) -> None:
    feeds, constants, attributes = conv_case(name, channels=96, batch=3)
    results = [run_form(name, feeds, threads=t, attributes=attributes, constants=constants)[0] for t in (1, 2, 3, 8)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"x_scale": np.zeros(1, np.float32)}, ["x_scale", "above 0"]),
        ({"x_scale": np.ones(2, np.float32)}, ["x_scale", "[2]"]),
        ({"y_scale": np.full(1, np.nan, np.float32)}, ["y_scale", "finite"]),
        ({"bias": np.zeros(3, np.float32)}, ["bias", "[3]", "[35]"]),
        ({"weight": np.zeros((35, 3, 19), np.uint8)}, ["weight", "[35,3,19]"]),
    ],
    ids=["scale-0", "scale-shape", "scale-nan", "bias-shape", "weight-rank"],
)
def test_wrong_constants_raise_with_the_node_name(
    make_model: MakeModel, open_model: OpenModel, library: Path, changed: dict[str, Array], parts: list[str]
) -> None:
    _, constants, attributes = conv_case("QuantizedConv")
    model = make_model("QuantizedConv", attributes=attributes, constants=constants | changed, with_body=False)
    with pytest.raises(Exception, match="QuantizedConv node 'block/node'") as caught:
        open_model(model, library=library)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("shape", "part"), [((1, 9, 12, 18), "[1,9,12,18]"), ((9, 12, 19), "[9,12,19]"), ((1, 0, 12, 19), "[1,0,12,19]")]
)
def test_wrong_maps_raise_with_the_node_name(
    make_model: MakeModel, open_model: OpenModel, library: Path, shape: tuple[int, ...], part: str
) -> None:
    _, constants, attributes = conv_case("QuantizedConv")
    model = make_model("QuantizedConv", attributes=attributes, constants=constants, with_body=False)
    with pytest.raises(Exception, match="QuantizedConv node 'block/node'") as caught:
        open_model(model, library=library).run(None, {"x": np.zeros(shape, np.uint8)})
    assert part in str(caught.value)
