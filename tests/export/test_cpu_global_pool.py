"""Means over a plane become GlobalAveragePool, and other means stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.lower.cpu_global_pool import global_pools

HEAD = '<ir_version: 10, opset_import: ["" : 20]>'


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return y


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("axes", ["2, 3", "-1, -2", "3, 2"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_the_plane_is_a_pool(axes: str, keepdims: int) -> None:
    shape = "batch, 4, 1, 1" if keepdims else "batch, 4"
    text = f"""{HEAD} g (float[batch, 4, 5, 6] x) => (float[{shape}] y) <int64[2] axes = {{{axes}}}>
        {{ [pool] y = ReduceMean <keepdims: int = {keepdims}> (x, axes) }}"""
    model, stock = ir.from_onnx_text(text), ir.from_onnx_text(text)
    assert global_pools(model) == 1
    assert operators(model) == ["GlobalAveragePool"] + ([] if keepdims else ["Flatten"])
    assert all(str(node.name).startswith("pool/") for node in model.graph)
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 6), dtype=np.float32)
    np.testing.assert_allclose(run(model, x), run(stock, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "axes"),
    [
        ("float[batch, 4, 5, 6]", "float[batch, 4, 1, 6]", "2"),
        ("float[batch, 4, 5, 6]", "float[batch, 1, 1, 1]", "1, 2, 3"),
        ("float[batch, tokens, 8]", "float[batch, tokens, 1]", "2"),
        ("double[batch, 4, 5, 6]", "double[batch, 4, 1, 1]", "2, 3"),
    ],
    ids=["one-axis", "channels-too", "tokens", "double"],
)
def test_other_means_stay(x: str, y: str, axes: str) -> None:
    count = len(axes.split(","))
    model = ir.from_onnx_text(
        f"{HEAD} g ({x} x) => ({y} y) <int64[{count}] axes = {{{axes}}}> {{ y = ReduceMean (x, axes) }}"
    )
    assert global_pools(model) == 0
    assert operators(model) == ["ReduceMean"]


def test_axes_that_are_no_constant_stay() -> None:
    model = ir.from_onnx_text(
        f"{HEAD} g (float[batch, 4, 5, 6] x, int64[2] axes) => (float y) {{ y = ReduceMean (x, axes) }}"
    )
    assert global_pools(model) == 0
