"""Which layers of a model can be INT8, and the plan that puts all of them into it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.target import nearest


class Exempt(StrEnum):
    """Why a layer stays in floating point."""

    HEAD = "the head: its error goes straight to the output"
    STEM = "the first convolution: few multiply-adds on raw input"
    DEPTHWISE = "depthwise: few multiply-adds, no faster in INT8, and the most sensitive to it"
    GATE = "inside a gate: few multiply-adds that decide over whole channels"
    EXCLUDED = "excluded by the user"
    LOSS = "its INT8 form loses too much on the calibration data"
    NO_FP8 = "a convolution that TensorRT has no FP8 kernel for: groups, channels, or the size of its kernel"
    FORM = "its weight is not a constant matrix or its attributes have no INT8 kernel"


def weighted_nodes(model: ir.Model) -> list[ir.Node]:
    """Linear layers and convolutions: MatMul, Gemm and Conv with a constant weight."""
    return [n for n in model.graph if n.op_type in ("MatMul", "Gemm", "Conv") and weight_of(n) is not None]


def weight_of(node: ir.Node) -> ir.Value | None:
    """The weight of a weighted node, when it is a constant."""
    weight = node.inputs[1]
    return weight if weight is not None and weight.const_value is not None else None


MAX_EXEMPT_SHARE = 0.095
"""Of the multiply-adds: `int8` promises 90 %, so depthwise layers stay out of it only as far as that allows."""


def plan_int8(model: ir.Model, exclude: Sequence[str] = ()) -> PrecisionPlan:
    """INT8 for every linear layer and convolution but the head, what stands inside a gate, the cheapest depthwise
    convolutions and the stem, and what lies below a module path in `exclude`.

    Raises UsageError for a path below which there is no layer.
    """
    nodes = weighted_nodes(model)
    names = [str(n.name).rpartition("/")[0] for n in nodes]
    for path in exclude:
        if not any(_below(name, path) for name in names):
            raise UsageError("--exclude names no module with a layer", got=path, expected=nearest(path, set(names)))
    outputs = {id(o) for o in model.graph.outputs}
    reasons: dict[str, Exempt | None] = {}
    for node, name in zip(nodes, names, strict=True):
        reasons[str(node.name)] = (
            Exempt.EXCLUDED
            if any(_below(name, path) for path in exclude)
            else Exempt.FORM
            if not has_kernel(node)
            else Exempt.HEAD
            if _feeds_output(node, outputs)
            else Exempt.GATE
            if _inside_gate(node)
            else None
        )
    _exempt_cheap(model, nodes, reasons)
    return PrecisionPlan(
        tuple(LayerPlan(str(n.name), _scheme(n, reasons[str(n.name)]), reasons[str(n.name)] or "") for n in nodes)
    )


def _scheme(node: ir.Node, reason: Exempt | None) -> Scheme:
    if reason is not None:
        return Scheme.FLOAT
    return Scheme.STATIC if node.op_type == "Conv" else Scheme.PER_TOKEN


def _exempt_cheap(model: ir.Model, nodes: Sequence[ir.Node], reasons: dict[str, Exempt | None]) -> None:
    """Exempts depthwise convolutions, the cheapest first, then the stem, as long as the exempt share stays small."""
    work = {str(n.name): multiply_adds(n) for n in nodes}
    room = MAX_EXEMPT_SHARE * sum(work.values()) - sum(w for name, w in work.items() if reasons[name] is not None)
    convs = [n for n in nodes if n.op_type == "Conv" and reasons[str(n.name)] is None]
    depthwise = sorted((n for n in convs if n.attributes.get_int("group", 1) > 1), key=lambda n: work[str(n.name)])
    stem = [n for n in convs if any(n.inputs[0] is i for i in model.graph.inputs)]
    for node in (*depthwise, *stem):
        name = str(node.name)
        if work[name] <= room:
            room -= work[name]
            reasons[name] = Exempt.STEM if node in stem else Exempt.DEPTHWISE


def multiply_adds(node: ir.Node) -> int:
    """Of a weighted node for one sample, from the shapes in the graph; a dimension that is not known counts as 1."""
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    shape = node.outputs[0].shape
    result = math.prod(d for d in shape if isinstance(d, int)) if shape is not None else 1
    dims = tuple(int(d) for d in weight.const_value.shape)
    if node.op_type == "Conv":
        return result * math.prod(dims[1:])
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
    return result * (dims[-1] if transposed else dims[-2])


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def has_kernel(node: ir.Node) -> bool:
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    rank = len(weight.const_value.shape)
    if weight.dtype != ir.DataType.FLOAT:
        return False
    if node.op_type == "Conv":
        return rank == 4
    if node.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        return rank == 2 and all(node.attributes[k].value == v for k, v in plain.items() if k in node.attributes)
    return rank == 2


def _feeds_output(node: ir.Node, outputs: set[int]) -> bool:
    """True when only bias and shape stand between the layer and an output of the model."""
    value = node.outputs[0]
    while True:
        if id(value) in outputs:
            return True
        uses = [u for u, _ in value.uses()]
        if len(uses) != 1 or uses[0].op_type not in ("Add", "Reshape", "Flatten", "Squeeze", "Identity"):
            return False
        value = uses[0].outputs[0]


_POOLS = ("GlobalAveragePool", "GlobalMaxPool", "ChannelPoolMean", "ChannelPoolMax", "ChannelPoolMeanMax")


_GATE_LAYERS = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Relu", "Sigmoid", "HardSigmoid", "Mul", "Div", "Reshape", "Squeeze",
     "Unsqueeze", "Concat", "Clip", "HardSwish", "Swish"}
)  # fmt: skip
"""What may stand between a channel pool and its gate."""


def _inside_gate(node: ir.Node) -> bool:
    """True when the layer's input comes from a channel pool through other layers of one pixel."""
    value = node.inputs[0]
    for _ in range(12):
        producer = value.producer() if value is not None else None
        if producer is None:
            return False
        if producer.op_type in _POOLS:
            return node.op_type == "Conv" or producer.domain != ""
        if producer.op_type not in _GATE_LAYERS:
            return False
        shape = producer.outputs[0].shape
        if shape is not None and len(shape) == 4 and any(d != 1 for d in shape[2:]):
            return False
        value = producer.inputs[0]
    return False
