"""A precision plan: for each weighted operator what it is computed in, by which scheme, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.target import nearest


class Scheme(StrEnum):
    FLOAT = "float32"
    DYNAMIC_PER_TOKEN = "int8, weights per output channel, activations per token at run time"
    STATIC_PER_TENSOR = "int8, weights per output channel, activations by calibrated ranges"


class Exempt(StrEnum):
    """Why a layer stays in floating point."""

    HEAD = "the head: its error goes straight to the output"
    STEM = "the first convolution: few multiply-adds on raw input"
    GATE = "inside a gate: few multiply-adds that decide over whole channels"
    EXCLUDED = "excluded by the user"
    FORM = "its weight is not a constant matrix or its attributes have no INT8 kernel"


@dataclass(frozen=True)
class LayerPlan:
    """`layer` is the ONNX node's name, which starts with the module path."""

    layer: str
    scheme: Scheme
    reason: str = ""


@dataclass(frozen=True)
class PrecisionPlan:
    layers: tuple[LayerPlan, ...]

    def scheme(self, layer: str) -> Scheme:
        return next((p.scheme for p in self.layers if p.layer == layer), Scheme.FLOAT)

    @property
    def exempt(self) -> tuple[str, ...]:
        """Names of the weighted layers left in floating point, with the reason."""
        return tuple(f"{p.layer}: {p.reason}" for p in self.layers if p.scheme is Scheme.FLOAT)


def weighted_nodes(model: ir.Model) -> list[ir.Node]:
    """Linear layers and convolutions: MatMul, Gemm and Conv with a constant weight."""
    return [n for n in model.graph if n.op_type in ("MatMul", "Gemm", "Conv") and weight_of(n) is not None]


def weight_of(node: ir.Node) -> ir.Value | None:
    """The weight of a weighted node, when it is a constant."""
    weight = node.inputs[1]
    return weight if weight is not None and weight.const_value is not None else None


def plan_int8(model: ir.Model, exclude: Sequence[str] = ()) -> PrecisionPlan:
    """INT8 for every linear layer and convolution but the head, the stem, what stands inside a gate, and what lies
    below a module path in `exclude`. Raises UsageError for a path below which there is no layer."""
    names = [str(n.name).rpartition("/")[0] for n in weighted_nodes(model)]
    for path in exclude:
        if not any(_below(name, path) for name in names):
            raise UsageError("--exclude names no module with a layer", got=path, expected=nearest(path, set(names)))
    outputs = {id(o) for o in model.graph.outputs}
    stem_seen = False
    layers = []
    for node in weighted_nodes(model):
        scheme = Scheme.STATIC_PER_TENSOR if node.op_type == "Conv" else Scheme.DYNAMIC_PER_TOKEN
        exempt: Exempt | None = None
        if any(_below(str(node.name).rpartition("/")[0], path) for path in exclude):
            exempt = Exempt.EXCLUDED
        elif not _has_kernel(node):
            exempt = Exempt.FORM
        elif _feeds_output(node, outputs):
            exempt = Exempt.HEAD
        elif node.op_type == "Conv" and not stem_seen and _reads_input(node, model):
            exempt, stem_seen = Exempt.STEM, True
        elif _inside_gate(node):
            exempt = Exempt.GATE
        if exempt is not None:
            scheme = Scheme.FLOAT
        layers.append(LayerPlan(str(node.name), scheme, exempt or ""))
    return PrecisionPlan(tuple(layers))


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _has_kernel(node: ir.Node) -> bool:
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


def _reads_input(node: ir.Node, model: ir.Model) -> bool:
    return any(node.inputs[0] is i for i in model.graph.inputs)


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
