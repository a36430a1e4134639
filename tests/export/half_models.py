"""Tiny ONNX models for half graphs, how they are run, and what must hold of every half graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime

from attn_deploy.export.functions import attach_functions
from attn_deploy.export.precision.half import HalfPlan, to_half
from attn_deploy.export.precision.half_ranges import collect_magnitudes
from attn_deploy.export.precision.half_rules import Kept
from attn_deploy.target import Precision

Array = np.ndarray[Any, Any]
FP16, BF16 = Precision.FP16, Precision.BF16
HALVES = {FP16: np.float16, BF16: ml_dtypes.bfloat16}
HALF_IR = {FP16: ir.DataType.FLOAT16, BF16: ir.DataType.BFLOAT16}
LOWEST = -3.4028234663852886e38


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(text: str, opset: int = 20, **weights: Array) -> ir.Model:
    """A model from ONNX text; `stage_0_fc__MatMul` is the node `stage.0.fc/MatMul`."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "attn_deploy" : 1, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = str(node.name).replace("__", "/").replace("_", ".")
    attach_functions(model)
    return model


def open_model(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run(model: ir.Model, **feeds: Array) -> Array:
    return next(iter(open_model(model)(feeds).values()))


def halved(model: ir.Model, precision: Precision = FP16, *feeds: dict[str, Array], **options: Any) -> HalfPlan:
    """In place, with the magnitudes of the feeds; the result is checked as strictly as ONNX can, and its casts."""
    magnitudes = collect_magnitudes(model, feeds, open_model) if feeds else {}
    names = [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]
    plan = to_half(model, precision, magnitudes, **options)
    require_well_formed(model)
    assert [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)] == names
    return plan


def require_well_formed(model: ir.Model) -> None:
    """Types hold everywhere; no Cast stands behind another or between equal types; none is unread."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True)
    for node in model.graph:
        if node.op_type == "Cast":
            source = node.inputs[0]
            assert source is not None
            assert source.producer() is None or source.producer().op_type != "Cast", node.name  # type: ignore[union-attr]
            assert source.dtype != node.outputs[0].dtype, node.name
            assert node.outputs[0].uses() or node.outputs[0].is_graph_output(), node.name
    readers = [(n.name, i.name) for n in model.graph if n.op_type == "Cast" for i in n.inputs if i is not None]
    kinds = [n.outputs[0].dtype for n in model.graph if n.op_type == "Cast"]
    assert max(Counter(zip(readers, kinds, strict=True)).values(), default=1) == 1


def kept(plan: HalfPlan) -> dict[str, Kept]:
    return {k.node: k.reason for k in plan.kept}


def types(model: ir.Model) -> dict[str, str]:
    """Of the values that nodes make, by name."""
    return {str(o.name): o.dtype.name for n in model.graph for o in n.outputs if o.dtype is not None}


MLP = """net (float[batch, 5, 16] x) => (float[batch, 5, 8] y)
{
    [norm__LayerNormalization] n = LayerNormalization (x, gamma, beta)
    [fc1__MatMul] p = MatMul (n, w1)
    [fc1__Add] h = Add (p, b1)
    [act__Gelu] g = Gelu (h)
    [fc2__MatMul] q = MatMul (g, w2)
    [skip__Add] r = Add (q, x)
    [head__MatMul] l = MatMul (r, w3)
    [head__Add] y = Add (l, b3)
}"""
MLP_WEIGHTS = {
    "gamma": normal(16, seed=1), "beta": normal(16, seed=2), "w1": normal(16, 32, seed=3) / 4, "b1": normal(32, seed=4),
    "w2": normal(32, 16, seed=5) / 6, "w3": normal(16, 8, seed=6) / 4, "b3": normal(8, seed=7),
}  # fmt: skip
X = normal(3, 5, 16, seed=9)
