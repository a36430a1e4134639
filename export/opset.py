"""The opset of a model, raised where that changes nothing but which types are allowed."""

from __future__ import annotations

import onnx_ir as ir
from onnx import defs


def raise_opset(model: ir.Model, opset: int) -> bool:
    """Raises the opset of ONNX's own operators, in place. False, and nothing done, where the schema of an operator of
    the graph means another thing at the new opset."""
    old = model.opset_imports.get("", 0)
    if old >= opset:
        return True
    nodes = [n for n in model.graph.all_nodes() if n.domain in ("", "ai.onnx")]
    if not all(_only_types_differ(node, old, opset) for node in nodes):
        return False
    model.graph.opset_imports[""] = opset
    return True


def _only_types_differ(node: ir.Node, old: int, new: int) -> bool:
    """An attribute that is new and may be left out changes nothing either (block_size of QuantizeLinear)."""
    if node.op_type == "GroupNormalization" and old < 21 <= new:  # one scale per channel instead of one per group
        return False
    try:
        before, after = defs.get_schema(node.op_type, old, ""), defs.get_schema(node.op_type, new, "")
    except defs.SchemaError:
        return False
    same_operands = all(
        [(p.name, p.option) for p in old_ones] == [(p.name, p.option) for p in new_ones]
        for old_ones, new_ones in ((before.inputs, after.inputs), (before.outputs, after.outputs))
    )
    kept = all(
        name in after.attributes and after.attributes[name].default_value == attribute.default_value
        for name, attribute in before.attributes.items()
    )
    required = {name for name, attribute in after.attributes.items() if attribute.required}
    return same_operands and kept and required <= set(before.attributes)
