"""Linear layers with what stands around them: LayerNorm before, bias, layer scale, activation and residual after.

Found by what is computed, from the product with a constant weight on. A value that something else reads too, or that
the model gives out, ends what is taken in. Nothing is copied: a LinearLayer says which nodes one operator can replace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cpu_activation import activation_behind
from attn_deploy.export.lower.cpu_rows import normalizes_last_axis
from attn_deploy.export.lower.cuda_nodes import FLOAT, constant_of, dims
from attn_deploy.ops.linear import name_of
from attn_deploy.session import Array


@dataclass(frozen=True)
class Norm:
    """LayerNormalization of `x` over its last axis, with constant scale and bias [channels]."""

    node: ir.Node
    x: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    epsilon: float

    @property
    def channels(self) -> int:
        array = constant_of(self.scale)
        assert array is not None
        return int(array.size)


@dataclass(frozen=True)
class LinearLayer:
    """residual + activation(norm(x) @ weight + bias): `nodes` compute it, in order, without the norm's; the last one
    makes the result. `x` is what the product reads; `scales` are layer scales behind the bias. `quantized`: by
    the operator whose weight is in 8 bits."""

    product: ir.Node
    nodes: tuple[ir.Node, ...]
    x: ir.Value
    added: ir.Value | None = None
    scales: tuple[ir.Value, ...] = ()
    activation: str = ""
    residual: ir.Value | None = None
    norm: Norm | None = None
    quantized: bool = False

    @property
    def result(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def source(self) -> ir.Value:
        """What the operator reads: the norm's operand where there is a norm."""
        return self.x if self.norm is None else self.norm.x

    @property
    def form(self) -> str:
        name = name_of(self.norm is not None, self.activation, self.residual is not None)
        return in_8_bits(name) if self.quantized else name

    @cached_property
    def shape(self) -> tuple[int, int]:
        """[in, out]."""
        held = weight_value(self.product).const_value
        assert held is not None
        rows, columns = (int(d) for d in held.shape)
        return (columns, rows) if is_transposed(self.product) else (rows, columns)

    def weight(self) -> Array:
        """[in, out], with the layer scales in it."""
        array = constant_of(weight_value(self.product))
        assert array is not None
        array = array.T if is_transposed(self.product) else array
        return np.ascontiguousarray(array * self._factor() if self.scales else array)

    def bias(self) -> Array:
        """[out]; zeros where the layer has none."""
        array = np.zeros(self.shape[1], np.float32) if self.added is None else constant_of(self.added)
        assert array is not None
        return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), self.shape[1:]) * self._factor(), np.float32)

    def _factor(self) -> Array:
        factor = np.ones(1, np.float32)
        for scale in self.scales:
            array = constant_of(scale)
            assert array is not None
            factor = factor * array.reshape(-1)
        return factor


def in_8_bits(form: str) -> str:
    """The form of the same operator whose weights are in 8 bits."""
    return f"Quantized{form}"


def linear_layers(model: ir.Model) -> Iterator[LinearLayer]:
    """Every linear layer in FP32, with all that can be taken in, in graph order. Of two layers whose sum is read, the
    first takes the addition."""
    sums: set[ir.Node] = set()
    for node in model.graph:
        layer = _product(node)
        if layer is None:
            continue
        layer = _with_activation(_with_bias(layer))
        summed = _with_residual(layer)
        if summed.residual is not None and summed.nodes[-1] not in sums:
            sums.add(summed.nodes[-1])
            layer = summed
        yield _with_norm(layer)


def narrowed(layer: LinearLayer, forms: frozenset[str]) -> LinearLayer | None:
    """The layer with as much around it as one of `forms` takes; None where not even the bare one is there."""
    for norm in (layer.norm, None):
        for part in _prefixes(layer):
            candidate = replace(part, norm=norm)
            if candidate.form in forms:
                return candidate
    return None


def bare(layer: LinearLayer) -> LinearLayer:
    """Product, bias and layer scales alone."""
    *_, last = _prefixes(layer)
    return replace(last, norm=None)


def _prefixes(layer: LinearLayer) -> Iterator[LinearLayer]:
    """Without the residual, then without the activation: what is left out stays behind the operator."""
    yield layer
    if layer.residual is not None:
        layer = replace(layer, residual=None, nodes=layer.nodes[:-1])
        yield layer
    if layer.activation:
        yield replace(layer, activation="", nodes=layer.nodes[: _bare_length(layer)])


def _bare_length(layer: LinearLayer) -> int:
    return 1 + (layer.added is not None and layer.product.op_type == "MatMul") + len(layer.scales)


def _product(node: ir.Node) -> LinearLayer | None:
    """MatMul of rank 2 and more with a constant matrix, or a plain Gemm."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    x, weight = node.inputs[0], constant_of(node.inputs[1])
    if x is None or x.dtype != FLOAT or constant_of(x) is not None or weight is None or weight.ndim != 2:
        return None
    if weight.dtype != np.float32 or len(dims(x)) < 2 or 0 in weight.shape:
        return None
    if node.op_type == "MatMul":
        return LinearLayer(node, (node,), x)
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if any(node.attributes[k].value != v for k, v in plain.items() if k in node.attributes):
        return None
    added = node.inputs[2] if len(node.inputs) > 2 else None
    layer = LinearLayer(node, (node,), x, added)
    return layer if added is None or _is_vector(added, layer.shape[1]) else None


def _with_bias(layer: LinearLayer) -> LinearLayer:
    """Add of a constant vector, unless Gemm had one, then layer scales."""
    width = layer.shape[1]
    reader = only_reader(layer.result)
    if layer.added is None and reader is not None and reader.op_type == "Add" and not reader.domain:
        vector = _other(reader, layer.result)
        if vector is not None and _is_vector(vector, width):
            layer = replace(layer, nodes=(*layer.nodes, reader), added=vector)
    while (reader := only_reader(layer.result)) is not None and reader.op_type == "Mul" and not reader.domain:
        vector = _other(reader, layer.result)
        if vector is None or not _is_vector(vector, width, scalar=True):
            break
        layer = replace(layer, nodes=(*layer.nodes, reader), scales=(*layer.scales, vector))
    return layer


def _with_activation(layer: LinearLayer) -> LinearLayer:
    if layer.result.is_graph_output():
        return layer
    found = activation_behind(layer.result)
    return layer if found is None else replace(layer, nodes=(*layer.nodes, *found.nodes), activation=found.name)


def _with_residual(layer: LinearLayer) -> LinearLayer:
    """Add of a value of the result's own shape that is computed: no broadcast."""
    reader = only_reader(layer.result)
    if reader is None or reader.op_type != "Add" or reader.domain:
        return layer
    other = _other(reader, layer.result)
    if other is None or constant_of(other) is not None or other.dtype != FLOAT or not same_shape(other, layer.result):
        return layer
    return replace(layer, nodes=(*layer.nodes, reader), residual=other)


def _with_norm(layer: LinearLayer) -> LinearLayer:
    """A norm that only this layer reads: several would each compute it again."""
    node = layer.x.producer()
    if node is None or node.op_type != "LayerNormalization" or node.domain or only_reader(layer.x) is None:
        return layer
    x, scale = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    width, stash = layer.shape[0], node.attributes.get_int("stash_type", 1)
    if x is None or x.dtype != FLOAT or scale is None or stash != 1 or any(o.uses() for o in node.outputs[1:]):
        return layer
    if not normalizes_last_axis(node) or not _is_vector(scale, width) or not (bias is None or _is_vector(bias, width)):
        return layer
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    assert epsilon is not None
    return replace(layer, norm=Norm(node, x, scale, bias, epsilon))


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value, once; None where the model gives it out too."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Known and equal, symbols by their names."""
    return bool(dims(one)) and None not in dims(one) and dims(one) == dims(other)


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    others = [i for i in node.inputs if i is not value]
    return others[0] if len(others) == 1 else None


def _is_vector(value: ir.Value, width: int, *, scalar: bool = False) -> bool:
    """Constant, one number for each output channel (or one for all of them), of a shape that adds no axis."""
    array = constant_of(value)
    if array is None or array.dtype != np.float32 or array.ndim > 1:
        return False
    return array.shape == (width,) or (scalar and array.size == 1)


def weight_value(product: ir.Node) -> ir.Value:
    weight = product.inputs[1]
    assert weight is not None
    return weight


def is_transposed(product: ir.Node) -> bool:
    return product.op_type == "Gemm" and bool(product.attributes.get_int("transB", 0))
