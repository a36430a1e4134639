"""Which nodes stay FP32 in a half graph, and why (facts: precision; each rule below is one function)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.half_masks import Masks
from attn_deploy.export.precision.half_types import LARGEST, half_operands, is_float, rounded
from attn_deploy.parity import sqnr_db

MAX_MAGNITUDE = 512.0
"""Of an FP16 node's operands on calibration data: 7 bits of room below 65504 for inputs that are larger than those."""

MAX_POOLED_PIXELS = 2048
"""A global mean over more sums too many terms for FP16."""

MIN_CONSTANT_DB = 60.0
"""A half constant without underflow has 66 dB and more: 11 bits of significand."""

STATISTICS = frozenset(
    {"Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "SkipLayerNormalization",
     "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "InstanceNormalization", "GroupNormalization",
     "GroupNorm", "SkipGroupNorm"}
)  # fmt: skip
"""Operators whose sums a kernel may keep in FP32 although its operands are half."""

SUMS = frozenset(
    {"ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
     "ReduceProd", "CumSum"}
)  # fmt: skip
DECISIONS = frozenset(
    {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "ArgMax", "ArgMin", "TopK", "NonZero", "Unique"}
)
MOVEMENT = frozenset(
    {"Reshape", "Transpose", "Slice", "Concat", "Split", "Gather", "GatherElements", "GatherND", "Squeeze", "Unsqueeze",
     "Expand", "Identity", "Flatten", "Tile", "Pad", "DepthToSpace", "SpaceToDepth", "ScatterElements", "ScatterND"}
)  # fmt: skip
"""What gives the bits that it is given, in another place."""


def reads_any_float(node: ir.Node) -> bool:
    """True for what reads FP32 and half alike and gives no float: it takes its input as it comes."""
    return node.op_type in ("Shape", "Size", "IsNaN", "IsInf") or (
        node.op_type == "Cast" and not is_float(node.outputs[0])
    )


class Kept(StrEnum):
    """Why a node of a half graph stays FP32."""

    REQUESTED = "asked for"
    LOSS = "its block alone loses too much"
    RANGE = "a value is too large on the calibration data"
    WEIGHT = "a weight is beyond the type's range"
    UNDERFLOW = "a constant is too small for the type"
    POWER = "powers overflow and lose their low bits"
    SUM = "sums lose what they add up"
    GLOBAL_MEAN = "a mean over more than 2048 pixels, or over a number that is not known"
    STATISTICS = "the target's kernel would keep its statistics in the half type"
    NORMALIZATION = "part of a normalization that is written out: its statistics are FP32 as a whole"
    LOGITS = "behind the last product: logits are FP32"
    ANGLE = "angles of sines and cosines, and the positions that they are made from"
    DECISION = "decides between values"
    NO_FORM = "the operator has no form of this type at the model's opset"
    NO_KERNEL = "the target has no kernel of this type"
    CONTROL_FLOW = "it holds a graph of its own"
    BETWEEN = "moves values between nodes that stay FP32"


@dataclass(frozen=True)
class HalfKernels:
    """What a target's kernels can do. `statistics`: operators that keep their sums in FP32 with half operands; those
    of STATISTICS that are not among them stay FP32. `own`: operators of our domain with a half kernel. `lacks`: true
    for a node that the target cannot run in the half type."""

    statistics: frozenset[str] = STATISTICS
    own: frozenset[str] = frozenset()
    lacks: Callable[[ir.Node], bool] = field(default=lambda node: False)


Reasons = dict[ir.Node, tuple[Kept, str]]
"""Node -> why it stays FP32, with the detail: the number, or what else is to be known."""


def rules(
    model: ir.Model, half: ir.DataType, opset: int, magnitudes: Mapping[str, float], kernels: HalfKernels,
    masks: Masks, forced: Mapping[str, tuple[Kept, str]],
) -> Reasons:  # fmt: skip
    """The nodes that stay FP32, each with the first reason that holds. `forced`: by node name, asked for or lossy."""
    reasons: Reasons = {}
    groups = [
        (_normalizations(model), Kept.NORMALIZATION),
        (_angles(model), Kept.ANGLE),
        (_behind_the_head(model), Kept.LOGITS),
    ]
    for node in model.graph:
        if not any(is_float(v) for v in (*node.inputs, *node.outputs)):
            continue
        found = forced.get(str(node.name)) or _single(node, half, opset, kernels)
        found = found or next(((reason, "") for group, reason in groups if node in group), None)
        found = found or _constants(node, half, masks)
        if found is None and half == ir.DataType.FLOAT16:
            found = _range(node, magnitudes, masks)
        if found is not None:
            reasons[node] = found
    _between(model, reasons)
    return reasons


def _single(node: ir.Node, half: ir.DataType, opset: int, kernels: HalfKernels) -> tuple[Kept, str] | None:
    """What follows from the node alone."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return Kept.CONTROL_FLOW, ""
    if node.op_type == "Pow":
        return Kept.POWER, ""
    if node.op_type in SUMS:
        return Kept.SUM, ""
    if node.op_type in DECISIONS:
        return Kept.DECISION, ""
    if half_operands(node, half, opset, kernels.own) is None:
        return Kept.NO_FORM, ""
    if kernels.lacks(node):
        return Kept.NO_KERNEL, ""
    if node.op_type in STATISTICS and node.op_type not in kernels.statistics:
        return Kept.STATISTICS, ""
    pixels = _pooled_pixels(node)
    if pixels is not None and pixels > MAX_POOLED_PIXELS:
        return Kept.GLOBAL_MEAN, "unknown" if math.isinf(pixels) else f"{pixels:.0f} pixels"
    return None


def _pooled_pixels(node: ir.Node) -> float | None:
    """Over how many pixels the node takes means; infinity where the shape does not say."""
    if node.op_type == "AveragePool":
        return float(math.prod(node.attributes["kernel_shape"].as_ints()))
    if node.op_type != "GlobalAveragePool" and not node.op_type.startswith("ChannelPoolMean"):
        return None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or not all(isinstance(d, int) for d in shape[2:]):
        return math.inf
    return float(math.prod(int(d) for d in shape[2:]))  # type: ignore[arg-type]


def _constants(node: ir.Node, half: ir.DataType, masks: Masks) -> tuple[Kept, str] | None:
    """BF16 has the range of FP32: only FP16 can overflow or underflow here."""
    if half != ir.DataType.FLOAT16:
        return None
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is None or not is_float(value) or (node, index) in masks.constants:
            continue
        array = value.const_value.numpy()
        finite = array[np.isfinite(array)]
        if not finite.size or not finite.any():
            continue
        largest = float(np.abs(finite).max())
        if largest > LARGEST[half]:
            return Kept.WEIGHT, f"{value.name} holds {largest:.4g}"
        if sqnr_db(finite, rounded(finite, half).astype(np.float32)) < MIN_CONSTANT_DB:
            return Kept.UNDERFLOW, f"{value.name} is at most {largest:.4g}"
    return None


def _range(node: ir.Node, magnitudes: Mapping[str, float], masks: Masks) -> tuple[Kept, str] | None:
    for value in (*node.inputs, *node.outputs):
        if value is None or not is_float(value) or value in masks.values or value.const_value is not None:
            continue
        magnitude = magnitudes.get(str(value.name), 0.0)
        if not magnitude <= MAX_MAGNITUDE:
            return Kept.RANGE, f"{value.name} reaches {magnitude:.4g}"
    return None


# -- groups of nodes -------------------------------------------------------------------------------------------------

_MAX_EPS = 1e-2
_TO_SUM = frozenset({"Sqrt", "Add", "Max", "Clip", "Mul", "Div", "Unsqueeze", "Squeeze", "Abs", "Reshape"})
_FROM_EPS = frozenset({"Sqrt", "Reciprocal", "Pow", "Max", "Clip", "Unsqueeze", "Expand", "Reshape"})


def _normalizations(model: ir.Model) -> set[ir.Node]:
    """Normalizations written out: from the sum over x (or its square) over the epsilon that keeps it off zero to the
    quotient. LayerNorm, RMSNorm, lengths of vectors, global response normalization."""
    found: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in ("Add", "Max", "Clip") and _epsilon(node):
            before = _back_to_sum(node)
            if before:
                found |= before | {node} | _forward_to_quotient(node)
    return found


def _epsilon(node: ir.Node) -> bool:
    scalars = [i.const_value for i in node.inputs if i is not None and i.const_value is not None and is_float(i)]
    return any(s.size == 1 and 0 < float(s.numpy().reshape(())) <= _MAX_EPS for s in scalars)


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer


def _back_to_sum(node: ir.Node) -> set[ir.Node]:
    """The nodes between an epsilon and the sum before it, with what prepares the terms: x - mean(x), squares."""
    path: list[ir.Node] = []
    current = node
    for _ in range(4):
        step = next((p for p in _producers(current) if p.op_type in SUMS or p.op_type in _TO_SUM), None)
        if step is None:
            return set()
        path.append(step)
        if step.op_type in SUMS:
            terms = {p for p in _producers(step) if p.op_type in ("Pow", "Mul", "Abs")}
            centred = {p for n in (*terms, step) for p in _producers(n) if p.op_type == "Sub"}
            means = {p for n in centred for p in _producers(n) if p.op_type in SUMS}
            return {*path, *terms, *(centred if means else ()), *means}
        current = step
    return set()


def _forward_to_quotient(node: ir.Node) -> set[ir.Node]:
    """With the constant weight and bias that follow."""
    found: set[ir.Node] = set()
    pending = [node]
    while pending:
        for reader, _ in pending.pop().outputs[0].uses():
            if reader in found:
                continue
            if reader.op_type in ("Div", "Mul"):
                found |= {reader, *_affine(reader)}
            elif reader.op_type in _FROM_EPS:
                found.add(reader)
                pending.append(reader)
    return found


def _affine(node: ir.Node) -> Iterator[ir.Node]:
    for operator in ("Mul", "Add"):
        readers = [r for r, _ in node.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != operator or not _has_constant(readers[0]):
            return
        node = readers[0]
        yield node


def _has_constant(node: ir.Node) -> bool:
    return any(i is not None and i.const_value is not None for i in node.inputs)


_ARITHMETIC = frozenset({"Mul", "Div", "Add", "Sub", "MatMul", "Einsum", "Neg", "Range", "Cast", "Exp"}) | MOVEMENT


def _angles(model: ir.Model) -> set[ir.Node]:
    """Sines and cosines with what their angles are made from: position times frequency passes FP16's 11 bits soon."""
    found: set[ir.Node] = set()
    pending = [n for n in model.graph if n.op_type in ("Sin", "Cos")]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [p for p in _producers(node) if p.op_type in _ARITHMETIC]
    return found


_TAIL = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Tanh",
        "Sigmoid",
        "Softmax",
        "LogSoftmax",
        "Reshape",
        "Squeeze",
        "Flatten",
        "Identity",
    }
)


def _behind_the_head(model: ir.Model) -> set[ir.Node]:
    """What stands between a layer's product and an output of the model."""
    found: set[ir.Node] = set()
    for output in model.graph.outputs:
        tail: list[ir.Node] = []
        node = output.producer() if is_float(output) else None
        while node is not None and node.op_type in _TAIL:
            tail.append(node)
            varying = [p for p in _producers(node) if any(is_float(o) for o in p.outputs)]
            node = varying[0] if len(varying) == 1 else None
        if node is not None and node.op_type in ("MatMul", "Gemm", "Conv"):
            found.update(tail)
    return found


def _between(model: ir.Model, reasons: Reasons) -> None:
    """Movement between FP32 and FP32 stays FP32: two casts less."""
    behind: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in MOVEMENT and node not in reasons:
            floats = [v for v in node.inputs if v is not None and is_float(v) and v.const_value is None]
            if floats and all(
                v.producer() is None or v.producer() in reasons or v.producer() in behind for v in floats
            ):
                behind.add(node)
    ahead: set[ir.Node] = set()
    for node in reversed(model.graph):
        if node in behind and all(
            reader in reasons or reader in ahead or reads_any_float(reader)
            for output in node.outputs
            if is_float(output)
            for reader, _ in output.uses()
        ):
            ahead.add(node)
    reasons.update((node, (Kept.BETWEEN, "")) for node in ahead)


def unknown_names(model: ir.Model, keep: Collection[str]) -> list[str]:
    """Of `keep`, what names neither a node nor a module path of the model."""
    names = {str(n.name) for n in model.graph}
    modules = {name.partition("/")[0] for name in names if "/" in name}
    return [k for k in keep if k not in names and not any(m == k or m.startswith(f"{k}.") for m in modules)]
