"""Making block operators: one node in place of those that a match names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cpu_linear import LinearLayer, Norm, is_transposed, weight_value
from attn_deploy.export.lower.cuda_nodes import dims
from attn_deploy.export.precision.insert import Inserter
from attn_deploy.export.precision.quantize_weight import quantize_weight
from attn_deploy.ops import DOMAIN, VERSION
from attn_deploy.ops.quantized import stored
from attn_deploy.session import Array


class Fuser:
    """Replaces in one model. Matches may have been made before: it knows what became of the values that they name.

    Nodes that are replaced stay behind, unread; RemoveUnusedNodesPass takes them away.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._replaced: dict[ir.Value, ir.Value] = {}
        self._quantized: dict[tuple[object, ...], list[ir.Value]] = {}

    def current(self, value: ir.Value) -> ir.Value:
        while value in self._replaced:
            value = self._replaced[value]
        return value

    def linear(self, layer: LinearLayer) -> None:
        inputs = [layer.source, *self.layer_constants(layer)]
        attributes: dict[str, float | int] = {}
        if layer.norm is not None:
            inputs += self.norm_constants(layer.norm)
            attributes = {"epsilon": layer.norm.epsilon}
        if layer.residual is not None:
            inputs.append(layer.residual)
        self.make(layer.form, inputs, attributes, named=layer.product, last=layer.nodes[-1])

    def make(
        self, form: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, float | int], *, named: ir.Node,
        last: ir.Node,
    ) -> None:  # fmt: skip
        """The operator stands where `last` is, gives what `last` gave, and is named after `named`."""
        old = last.outputs[0]
        made = ir.Value(name=old.name, shape=old.shape, type=old.type)
        operands = [None if i is None else self.current(i) for i in inputs]
        name = f"{named.name}/{form}"
        node = ir.node(form, operands, attributes, domain=DOMAIN, outputs=[made], name=name)
        node.metadata_props.update(named.metadata_props)
        self.model.graph.insert_before(last, node)
        self.model.opset_imports.setdefault(DOMAIN, VERSION)
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        old.name = f"{old.name}/replaced"
        self._replaced[old] = made

    def layer_constants(self, layer: LinearLayer) -> list[ir.Value]:
        """Weight [in, out] and bias [out]: those of the model where they are as they are needed, so that what layers
        share stays shared. Of a layer in 8 bits the weight as stored levels and its scale [out]."""
        if layer.quantized:
            weight = self._quantized_weight(layer)
        elif layer.scales or is_transposed(layer.product):
            weight = [self._constant(layer.product, "weight", layer.weight())]
        else:
            weight = [weight_value(layer.product)]
        if layer.added is None or layer.scales or dims(layer.added) != [layer.shape[1]]:
            return [*weight, self._constant(layer.product, "bias", layer.bias())]
        return [*weight, layer.added]

    def _quantized_weight(self, layer: LinearLayer) -> list[ir.Value]:
        """Those of a layer before where that has the same weight."""
        key = (weight_value(layer.product), is_transposed(layer.product), layer.scales)
        if key not in self._quantized:
            levels, scale = quantize_weight(layer.weight(), axis=1)
            constants = {"weight_uint8": stored(levels), "weight_scale": scale}
            self._quantized[key] = [self._constant(layer.product, label, a) for label, a in constants.items()]
        return self._quantized[key]

    def norm_constants(self, norm: Norm) -> list[ir.Value]:
        if norm.bias is not None:
            return [norm.scale, norm.bias]
        return [norm.scale, self._constant(norm.node, "bias", np.zeros(norm.channels, np.float32))]

    def _constant(self, named: ir.Node, label: str, array: Array) -> ir.Value:
        value = Inserter(self.model, named, "fused").constant(label, array)
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        return value
