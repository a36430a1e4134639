"""x + y, and the norm of the sum, as one operator, whose fourth output is the sum.

LayerNormalization becomes SkipLayerNormalization, RMSNormalization SkipSimplifiedLayerNormalization.
The bias of the linear layer that made y goes in as well. A Reshape between sum and norm that keeps the channels is
looked through: the operator reads [batch, tokens, channels], and reshapes around it move nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes, static

FUSED = {"LayerNormalization": "SkipLayerNormalization", "RMSNormalization": "SkipSimplifiedLayerNormalization"}


@dataclass(frozen=True)
class _Match:
    """`add` makes the sum that `norm` normalizes; `first` and `second` [batch, tokens..., channels] are its terms,
    without `bias` [channels], which was the last thing added to `second`."""

    norm: ir.Node
    add: ir.Node
    first: ir.Value
    second: ir.Value
    bias: ir.Value | None
    channels: int


def fuse_skip_norm(model: ir.Model) -> int:
    """In place; returns how many were fused."""
    fused = 0
    for node in list(model.graph):
        match = _match(node) if node.op_type in FUSED and node.domain == "" else None
        if match is not None:
            _replace(model, match)
            fused += 1
    return fused


def _match(norm: ir.Node) -> _Match | None:
    x, weights = norm.inputs[0], norm.inputs[1:]
    expected = 2 if norm.op_type == "LayerNormalization" else 1
    if x is None or len(weights) != expected or None in weights or any(o.uses() for o in norm.outputs[1:]):
        return None
    rank = len(x.shape) if x.shape is not None else 0
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    stash = norm.attributes["stash_type"].as_int() if "stash_type" in norm.attributes else 1
    channels = static(x, -1) if rank > 1 else None
    if channels is None or axis not in (-1, rank - 1) or stash != 1:
        return None
    if any(w is None or w.shape is None or list(w.shape) != [channels] for w in weights):
        return None
    add = _behind_reshapes(x, channels).producer()
    if add is None or add.op_type != "Add" or not _restorable(add.outputs[0]) or not _restorable(norm.outputs[0]):
        return None
    return _terms(norm, add, channels)


def _terms(norm: ir.Node, add: ir.Node, channels: int) -> _Match | None:
    first, second = add.inputs
    if first is None or second is None or not _same_shape(first, second):
        return None
    for term, other in ((second, first), (first, second)):
        source = _behind_reshapes(term, channels)
        layer = source.producer()
        if layer is None or layer.op_type != "Add" or not _used_once(term, source):
            continue
        biases = [i for i in layer.inputs if i is not None and i.is_initializer() and list(i.shape or ()) == [channels]]
        rest = [i for i in layer.inputs if i is not None and i not in biases]
        if len(biases) == 1 and len(rest) == 1:
            return _Match(norm, add, other, rest[0], biases[0], channels)
    return _Match(norm, add, first, second, None, channels)


def _behind_reshapes(value: ir.Value, channels: int) -> ir.Value:
    """The value that `value` is a reshape of; the last dimension stays `channels`."""
    while True:
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
        if source is None or source.shape is None or len(source.shape) < 2 or static(source, -1) != channels:
            return value
        value = source


def _used_once(value: ir.Value, source: ir.Value) -> bool:
    """Nothing else reads `value`, nor what stands between it and `source`."""
    while True:
        if len(value.uses()) != 1 or value.is_graph_output():
            return False
        if value is source:
            return True
        node = value.producer()
        assert node is not None
        assert node.inputs[0] is not None
        value = node.inputs[0]


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Known, equal, of rank 3 or more, with the batch in front."""
    if first.shape is None or second.shape is None or len(first.shape) < 3:
        return False
    return [str(d) for d in first.shape] == [str(d) for d in second.shape] and "None" not in map(str, first.shape)


def _restorable(value: ir.Value) -> bool:
    """Its shape can be written with no more than one symbol, in front, or is [batch, tokens, channels]."""
    if value.shape is None or len(value.shape) < 3:
        return False
    return len(value.shape) == 3 or all(isinstance(d, int) for d in value.shape[1:])


def _replace(model: ir.Model, match: _Match) -> None:
    norm, add = match.norm, match.add
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    # Where the sum was made, since others may read it before the norm does.
    nodes = Nodes(model, add, named=norm)
    terms = [_tokens(nodes, t, match.channels) for t in (match.second, match.first)]
    outputs = [ir.Value(name=f"{norm.name}/{part}", type=ir.TensorType(FLOAT)) for part in ("normalized", "sum")]
    keeps_sum = _read_elsewhere(add.outputs[0], norm, match.channels)
    inputs = [*terms, *norm.inputs[1:], *([match.bias] if match.bias is not None else [])]
    unused = [ir.Value(name=""), ir.Value(name="")]
    fused = ir.node(
        FUSED[norm.op_type], inputs, {"epsilon": epsilon}, domain="com.microsoft",
        outputs=[outputs[0], *unused, outputs[1]] if keeps_sum else outputs[:1],
        name=f"{norm.name}/{FUSED[norm.op_type]}",
    )  # fmt: skip
    fused.metadata_props.update(norm.metadata_props)
    model.graph.insert_before(add, fused)
    model.opset_imports.setdefault("com.microsoft", 1)
    for old, new in ((norm.outputs[0], outputs[0]), (add.outputs[0], outputs[1])):
        if old is norm.outputs[0] or keeps_sum:
            _take_over(nodes, old, new)
    for node in (norm, add):
        if node.graph is not None:
            _remove_unread(model, node)


def _tokens(nodes: Nodes, value: ir.Value, channels: int) -> ir.Value:
    """[batch, tokens, channels]."""
    source = _behind_reshapes(value, channels)
    value = source if source.shape is not None and len(source.shape) == 3 else value
    assert value.shape is not None
    return value if len(value.shape) == 3 else nodes.reshape(value, 0, -1, channels)


def _read_elsewhere(total: ir.Value, norm: ir.Node, channels: int) -> bool:
    if total.is_graph_output():
        return True
    value = norm.inputs[0]
    assert value is not None
    return not _used_once(value, total)


def _take_over(nodes: Nodes, old: ir.Value, new: ir.Value) -> None:
    """`new` [batch, tokens, channels] becomes what `old` was."""
    assert old.shape is not None
    name, shape = old.name, old.shape
    if len(shape) != 3:
        rest = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
        new = nodes.reshape(new, 0, *rest)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}/unfused"
    new.name, new.shape = name, shape


def _remove_unread(model: ir.Model, node: ir.Node) -> None:
    """The node and what only it reads."""
    if any(o.uses() or o.is_graph_output() for o in node.outputs):
        return
    producers = [i.producer() for i in node.inputs if i is not None]
    model.graph.remove(node, safe=True)
    for producer in producers:
        if producer is not None and producer.graph is not None:
            _remove_unread(model, producer)
