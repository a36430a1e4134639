"""Gates, with the residual add and the activation after them, on blocked maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_deploy.runtimes.blocked.activations import activation
from attn_deploy.runtimes.blocked.graph import Dims, is_a, other_input
from attn_deploy.runtimes.blocked.layout import Layout, Map

if TYPE_CHECKING:
    import onnx


def gate(layout: Layout) -> int:
    """Mul(ReorderOutput(x), gate) [-> Add(residual)] [-> activation] -> BlockedGate... on x."""
    replaced = 0
    for node in list(layout.graph.nodes):
        if is_a(node, "", "Mul") and node in layout.graph.nodes:
            replaced += _gate(layout, node)
    return replaced


def _gate(layout: Layout, product: onnx.NodeProto) -> int:
    graph = layout.graph
    sides = _sides(layout, product)
    if sides is None:
        return 0
    source, gate_value, per_pixel = sides
    chain = [product]
    operator, residual = "BlockedGate", _residual(layout, product, source)
    if residual is not None and "BlockedGateResidual" in layout.operators:
        operator = "BlockedGateResidual"
        chain += [n for n in (graph.only_consumer(product.output[0]),) if n is not None]
    else:
        residual = None
    last = graph.only_consumer(chain[-1].output[0])
    suffix = activation(last)
    if suffix is not None and operator + suffix in layout.operators and last is not None:
        operator += suffix
        chain.append(last)
    plain = chain[-1].output[0]
    if operator not in layout.operators or plain in graph.outputs:
        return 0
    vector = gate_value
    if not per_pixel:
        entered = layout.enter(gate_value, source.channels, product.name)
        if entered is None:
            return 0
        vector = entered.value
    inputs = [source.value, vector, *([residual.value] if residual is not None else [])]
    (made,) = layout.add(
        operator, inputs, channels=source.channels, name=product.name,
        shapes=[layout.shape_of(plain, source.channels)],
    )  # fmt: skip
    layout.settle(plain, Map(made, source.channels), product.name)
    for node in reversed(chain):
        graph.remove(node)
    return 1


def _sides(layout: Layout, product: onnx.NodeProto) -> tuple[Map, str, bool] | None:
    """(the blocked map, the gate, whether the gate is one number per pixel) of a product that is a gate's."""
    for plain in dict.fromkeys(product.input):
        source, gate_value = layout.blocked(plain), other_input(product, plain)
        dims = layout.graph.shape(plain)
        if source is None or gate_value is None or dims is None:
            continue
        found = layout.graph.shape(gate_value)
        if found is None or len(found) != 4 or len(dims) != 4:
            continue
        if _is(found, (dims[0], source.channels, 1, 1)):
            return source, gate_value, False
        if _is(found, (dims[0], 1, *dims[2:])) and source.channels > 1:
            return source, gate_value, True
    return None


def _is(found: Dims, wanted: Dims) -> bool:
    return found[0] in (wanted[0], 1) and found[1:] == wanted[1:]


def _residual(layout: Layout, product: onnx.NodeProto, source: Map) -> Map | None:
    """What is added to the gated map and to nothing else, where it is blocked too."""
    add = layout.graph.only_consumer(product.output[0])
    if not is_a(add, "", "Add") or add is None:
        return None
    other = other_input(add, product.output[0])
    found = layout.blocked(other) if other is not None else None
    same = other is not None and layout.graph.shape(other) == layout.graph.shape(product.output[0])
    return found if found is not None and same and found.channels == source.channels else None
