"""Means over a plane as GlobalAveragePool: ONNX Runtime runs that in its blocked layout, and leaves the layout for
ReduceMean."""

from __future__ import annotations

import onnx_ir as ir

_FLOATS = (ir.DataType.FLOAT, None)


def global_pools(model: ir.Model) -> int:
    """ReduceMean of [batch, channels, ...] over all dimensions but the first two becomes GlobalAveragePool, with a
    Flatten behind where those dimensions go; returns how many. Only in float32, and of maps: [batch, tokens, channels]
    has no plane."""
    found = [node for node in model.graph if is_plane_mean(node)]
    for node in found:
        _replace(node)
    return len(found)


def is_plane_mean(node: ir.Node) -> bool:
    """ReduceMean over all dimensions of a map but the first two."""
    x = node.inputs[0] if node.inputs else None
    if node.op_type != "ReduceMean" or node.domain not in ("", "ai.onnx") or x is None or x.shape is None:
        return False
    rank = len(x.shape)
    axes = _axes(node)
    if rank < 4 or axes is None or x.dtype not in _FLOATS:
        return False
    return sorted(axis % rank for axis in axes) == list(range(2, rank))


def _axes(node: ir.Node) -> list[int] | None:
    """Constant axes: an input since opset 18, an attribute before."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        content = ir.convenience.get_const_tensor(given)
        return None if content is None else [int(axis) for axis in content.numpy().ravel()]
    attribute = node.attributes.get("axes")
    return None if attribute is None else list(attribute.as_ints())


def _replace(node: ir.Node) -> None:
    graph, (old,) = node.graph, node.outputs
    assert graph is not None
    keepdims, name = node.attributes.get("keepdims"), node.name or old.name
    pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=f"{name}/GlobalAveragePool")
    nodes = [pool]
    if keepdims is not None and keepdims.as_int() == 0:
        nodes.append(ir.node("Flatten", pool.outputs, attributes={"axis": 1}, name=f"{name}/Flatten"))
    made = nodes[-1].outputs[0]
    made.name, made.shape, made.type = old.name, old.shape, old.type
    old.name = None
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [made])
