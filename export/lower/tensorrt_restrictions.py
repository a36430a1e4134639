"""What TensorRT's ONNX parser asks of single operators, as far as a model shows it before an engine is built.

From the restrictions in docs/operators.md (10.6, 10.15), the checks in onnxOpCheckers.cpp and the Attention importer of
onnx/onnx-tensorrt (10.15), and docs/Changelog.md for what came later than 10.3. Each check returns what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.session import Array

TOPK_LIMIT = 3840
"""K must be below it."""


@dataclass(frozen=True)
class Restriction:
    """`since`: the first version that does without it."""

    reason: str
    since: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _View:
    """A node as the checks read it."""

    node: ir.Node
    version: tuple[int, ...]
    opset: int

    def given(self, position: int) -> bool:
        return len(self.node.inputs) > position and self.node.inputs[position] is not None

    def constant(self, position: int) -> Array | None:
        """The value of an input that is known when the engine is built."""
        value = self.node.inputs[position] if self.given(position) else None
        if value is None:
            return None
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant":
            held = next(iter(producer.attributes.values())).value
            return np.asarray(held.numpy() if isinstance(held, ir.TensorProtocol) else held)
        return None

    def computed(self, position: int) -> bool:
        """True for an input that is there and not known when the engine is built."""
        return self.given(position) and self.constant(position) is None

    def rank(self, position: int = 0) -> int | None:
        value = self.node.inputs[position] if self.given(position) else None
        return None if value is None or value.shape is None else len(value.shape)

    def integer(self, name: str, default: int = 0) -> int:
        value = self.node.attributes.get_int(name, default)
        return default if value is None else value

    def text(self, name: str, default: str = "") -> str:
        value = self.node.attributes.get_string(name, default)
        return default if value is None else value

    def extra_outputs(self) -> bool:
        return any(output.name and (output.uses() or output.is_graph_output()) for output in self.node.outputs[1:])


Check = Callable[[_View], "str | Restriction | None"]


def restriction(node: ir.Node, version: tuple[int, ...], opset: int) -> Restriction | None:
    """What the parser does not take about this node, or None."""
    check = _CHECKS.get(node.op_type)
    found = None if check is None else check(_View(node, version, opset))
    return Restriction(found) if isinstance(found, str) else found


def _one_output(view: _View) -> str | None:
    return "only the first output is there" if view.extra_outputs() else None


def _attention(view: _View) -> str | None:
    node = view.node
    if len(node.outputs) != 1:
        return "one output alone: present keys, present values and the product of query and key are not there"
    if view.given(4) or view.given(5) or view.given(6):
        return "past keys, past values and key lengths are not there"
    if node.attributes.get_float("softcap", 0.0):
        return "softcap is not there"
    if "softmax_precision" in node.attributes:
        return "softmax_precision is not there"
    ranks = {rank for rank in (view.rank(0), view.rank(1), view.rank(2)) if rank is not None}
    if len(ranks) > 1 or ranks - {3, 4}:
        return f"query, key and value must have the same rank, 3 or 4, not {sorted(ranks)}"
    if (view.rank(3) or 0) > 4:
        return f"the mask must have rank 4 or less, not {view.rank(3)}"
    if view.given(3) and view.integer("is_causal"):
        return "a mask and is_causal exclude each other"
    scale = node.attributes.get_float("scale", 1.0)
    if scale is not None and scale <= 0:
        return f"scale must be positive, since the parser takes its root; it is {scale}"
    return None


def _batch_normalization(view: _View) -> str | None:
    return "training_mode must be 0" if view.integer("training_mode") else _one_output(view)


def _pool(view: _View) -> str | None:
    dilations = view.node.attributes.get_ints("dilations") or ()
    if any(d != 1 for d in dilations):
        return f"dilations must be 1, not {list(dilations)}"
    rank = view.rank()
    if rank is not None and rank not in (4, 5):
        return f"pools over 2 or 3 dimensions alone, and its input has rank {rank}"
    return _one_output(view)


def _constant(view: _View) -> str | None:
    names = {"sparse_value", "value_string", "value_strings"} & set(view.node.attributes)
    return f"{names.pop()} is not there" if names else None


FP8_SINCE = (10, 7)
"""Scales per channel of FP8 products: Hopper since 10.6, Ada since 10.7 (release notes)."""

_QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN})


def _quantize(view: _View) -> str | Restriction | None:
    node = view.node
    if view.computed(1) or view.computed(2):
        return "scale and zero point must be constants"
    scale = view.constant(1)
    if scale is not None and not (scale > 0).all():
        return "every scale must be positive"
    zero_point = view.constant(2)
    if zero_point is not None and zero_point.astype(np.float32).any():
        return f"the zero point must be 0, not {float(zero_point.ravel()[0]):g}"
    quantized = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    assert quantized is not None
    dtype = quantized.dtype
    if dtype is not None and dtype not in _QUANTIZED:
        return f"quantizes to INT8 or FLOAT8E4M3FN, not {dtype.name}"
    stated = view.integer("output_dtype") in [int(d) for d in _QUANTIZED]
    if node.op_type == "QuantizeLinear" and zero_point is None and not stated:
        return "without a zero point ONNX means UINT8: give an INT8 zero point of 0"
    if dtype is ir.DataType.FLOAT8E4M3FN and view.version < FP8_SINCE:
        return Restriction("FP8 with a scale for each channel", FP8_SINCE)
    return None


def _constant_axes(view: _View) -> str | None:
    return "axes must be a constant" if view.computed(1) else None


def _squeeze(view: _View) -> str | Restriction | None:
    if view.computed(1):
        return Restriction("axes must be a constant", (10, 7)) if view.version < (10, 7) else None
    has_axes = view.given(1) or "axes" in view.node.attributes
    if not has_axes and view.version < (11, 5):
        return Restriction("axes must be given", (11, 5))
    return None


def _unsqueeze(view: _View) -> Restriction | None:
    later = view.version >= (10, 7)
    return Restriction("axes must be a constant", (10, 7)) if view.computed(1) and not later else None


def _pad(view: _View) -> Restriction | None:
    return Restriction("axes are not there", (10, 4)) if view.given(3) and view.version < (10, 4) else None


def _top_k(view: _View) -> str | None:
    if not view.integer("sorted", 1):
        return "sorted must be 1"
    k = view.constant(1)
    if k is not None and int(k.max()) >= TOPK_LIMIT:
        return f"K must be below {TOPK_LIMIT}, not {int(k.max())}"
    return None


def _scatter_nd(view: _View) -> str | None:
    reduction = view.text("reduction", "none")
    return None if reduction == "none" else f"reduction must be none, not {reduction}"


_RESIZE_COORDINATES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")


def _resize(view: _View) -> str | None:
    coordinates = view.text("coordinate_transformation_mode", "half_pixel")
    if coordinates not in _RESIZE_COORDINATES:
        return f"coordinate_transformation_mode must be one of {', '.join(_RESIZE_COORDINATES)}, not {coordinates}"
    if (
        coordinates == "tf_half_pixel_for_nn"
        and view.text("nearest_mode", "round_prefer_floor") != "round_prefer_floor"
    ):
        return "tf_half_pixel_for_nn goes with round_prefer_floor alone"
    if view.integer("antialias"):
        return "antialias must be 0"
    policy = view.text("keep_aspect_ratio_policy", "stretch")
    return None if policy == "stretch" else f"keep_aspect_ratio_policy must be stretch, not {policy}"


def _cum_sum(view: _View) -> Restriction | None:
    return Restriction("axis must be a constant", (10, 8)) if view.computed(1) and view.version < (10, 8) else None


def _einsum(view: _View) -> str | Restriction | None:
    equation = view.text("equation").replace(" ", "")
    if any(c not in "abcdefghijklmnopqrstuvwxyz->.," for c in equation):
        return f"indices must be lower-case letters: {equation}"
    terms = equation.partition("->")[0].split(",")
    repeated = any(len(set(term)) != len(term) for term in terms)
    if ("." in equation or repeated) and view.version < (10, 12):
        return Restriction(f"neither ellipsis nor diagonal: {equation}", (10, 12))
    return None


def _pow(view: _View) -> Restriction | None:
    base, exponent = view.node.inputs[:2]
    integers = (ir.DataType.INT32, ir.DataType.INT64)
    if base is not None and base.dtype in integers and view.version < (10, 12):
        return Restriction("the base must be a float", (10, 12))
    if exponent is not None and exponent.dtype in integers and view.version < (10, 8):
        return Restriction("the exponent must be a float", (10, 8))
    return None


def _group_normalization(view: _View) -> Restriction | None:
    if view.opset >= 21 and view.version < (10, 9):
        return Restriction("opset 21 moved scale and bias to channels", (10, 9))
    return None


def _grid_sample(view: _View) -> Restriction | None:
    rank = view.rank()
    later = rank is None or rank == 4 or (rank == 5 and view.version >= (11, 2))
    return None if later else Restriction(f"the input must have rank 4, not {rank}", (11, 2) if rank == 5 else None)


def _one_hot(view: _View) -> str | None:
    return "depth must be a constant" if view.computed(1) else None


def _lstm(view: _View) -> str | None:
    set_names = [name for name in ("input_forget", "layout") if view.integer(name)]
    return f"{set_names[0]} must be 0" if set_names else None


def _norm_order(view: _View) -> str | None:
    order = view.integer("p", 2)
    return None if order in (1, 2) else f"p must be 1 or 2, not {order}"


def _lp_pool(view: _View) -> str | None:
    return _norm_order(view) or _pool(view)


def _dropout(view: _View) -> str | None:
    training = view.constant(2)
    if view.computed(2) or (training is not None and bool(training.any())):
        return "training_mode must be a constant that is false"
    return _one_output(view)


def _eye_like(view: _View) -> str | None:
    value = view.node.inputs[0]
    known = value is not None and value.shape is not None and all(isinstance(d, int) for d in value.shape)
    return None if known else "its input must have a shape that is known when the engine is built"


def _branches(view: _View) -> str | None:
    graphs = [view.node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    return None if len({len(g.outputs) for g in graphs}) == 1 else "both branches must have the same number of outputs"


def _tensor_scatter(view: _View) -> str | None:
    axis, ranks = view.integer("axis", -2), {view.rank(0), view.rank(1)} - {None, 4}
    return f"axis must be -2 and rank 4, not {axis} and {ranks or 4}" if axis != -2 or ranks else None


def _stft(view: _View) -> str | None:
    return "frame_step and window must be constants" if view.computed(1) or view.computed(2) else None


_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip

_CHECKS: dict[str, Check] = dict.fromkeys(_REDUCTIONS, _constant_axes) | {
    "Attention": _attention,
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalization,
    "Constant": _constant,
    "CumSum": _cum_sum,
    "DequantizeLinear": _quantize,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "EyeLike": _eye_like,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_normalization,
    "If": _branches,
    "LSTM": _lstm,
    "LayerNormalization": _one_output,
    "LpNormalization": _norm_order,
    "LpPool": _lp_pool,
    "MaxPool": _pool,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Pow": _pow,
    "QuantizeLinear": _quantize,
    "Resize": _resize,
    "STFT": _stft,
    "ScatterND": _scatter_nd,
    "Squeeze": _squeeze,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
    "Unsqueeze": _unsqueeze,
}
