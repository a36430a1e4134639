"""Gates: a product of a map with something computed from it, and with what stands right behind the product.

- Channel gates (squeeze-and-excitation, effective SE, ECA, global context, CBAM's channels) and spatial gates (CBAM's
  pixels, coordinate attention): the gate depends on the map through pools of it.
- Pixel attention (spatial_gate), residual attention (residual_gate), global response normalization (response_norm).

Maps have any layout and rank: [batch, channels, height, width], channels last, [batch, tokens, channels].

Two kinds of products with something pooled are left to others. A normalization (x * rsqrt(mean(x ** 2)), RMSNorm or
LayerNorm spelled by hand, softmax by hand) undoes the scale of what it multiplies: fed with a map c times as large, its
factor is c times as small. It is no gate, over whatever axes. And a map times weights that a softmax gives belongs to
that softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import MOVEMENT, aten, module_path, only_user, shape_of, source_line
from attn_deploy.export.recognize import response_norm
from attn_deploy.export.recognize.dependence import RAW, Dataflow, Dependence, Product, Way, packet, products
from attn_deploy.export.recognize.pools import Pools, pixel_pools, plane_pools
from attn_deploy.export.recognize.residual_gate import mask_of, one_plus
from attn_deploy.export.recognize.response_norm import ResponseNormMatch
from attn_deploy.export.recognize.site import Kind, Reason, Site, Skipped
from attn_deploy.export.recognize.spatial_gate import is_self_gate, squashed

ACTIVATIONS = {aten.relu.default: "Relu", aten.relu_.default: "Relu", aten.silu.default: "Silu"}
PROBE_SCALE = 4.0


@dataclass(frozen=True)
class GateMatch:
    """activation(x * gate + residual), the gate being the product of `gates`: each has x's rank or less, and
    broadcasts to x.

    `result` is what the operator replaces: the last product, its residual sum or its activation. `plane` and `pixels`
    are the pools that the gate is computed from.
    """

    kind: Kind
    x: Node
    gates: tuple[Node, ...]
    residual: Node | None
    activation: str
    product: Node
    result: Node
    plane: Pools | None = None
    pixels: Pools | None = None


Match = GateMatch | ResponseNormMatch


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every gate of the graph, and every product with something pooled from its partner that is none of ours."""
    flow = Dataflow(captured)
    taken: set[Node] = set()
    for product in products(flow, captured):
        node = product.node
        if node in taken:
            continue
        found = _match(flow, product)
        if isinstance(found, Reason):
            yield Skipped(Kind.CHANNEL_GATE, module_path(node), source_line(node), found, node)
            continue
        if isinstance(found, GateMatch):
            found = _with_tail(flow, found, taken)
        if found is not None:
            kind = Kind.RESPONSE_NORM if isinstance(found, ResponseNormMatch) else found.kind
            taken |= {node, found.result}
            yield Site(kind, module_path(node), source_line(node), found, node)


def _match(flow: Dataflow, product: Product) -> Match | Reason | None:
    """None when the product is no gate and has nothing to do with a pool of its partner."""
    for x, gate in product.sides:
        dependence = flow.dependence(x, gate)
        if dependence is not None and Way.POOLED in dependence.ways:
            return _pooled(flow, product, x, gate, dependence)
    for x, gate in product.sides:
        if not _fits(x, product.node, gate):
            continue
        mask = mask_of(flow, product, x, gate)
        if mask is not None and _fits(x, product.node, mask):
            # Where it is spelled as a sum, that is still to be taken in: it is the tail.
            return _gate(Kind.RESIDUAL_GATE, product, x, mask, residual=None if mask is gate else x)
        if is_self_gate(flow, x, gate):
            return _gate(Kind.SPATIAL_GATE, product, x, gate)
    return None


def _gate(kind: Kind, product: Product, x: Node, gate: Node, residual: Node | None = None) -> GateMatch | Reason:
    residual = residual or product.addend
    if residual is not None and shape_of(residual) != shape_of(product.node):
        return Reason.GATE_SHAPE
    return GateMatch(kind, x, (gate,), residual, "", product.node, product.node)


def _pooled(flow: Dataflow, product: Product, x: Node, gate: Node, dependence: Dependence) -> Match | Reason | None:
    """The product of a map and of something that depends on a pool of it."""
    if _is_softmax(gate) or _is_normalization(flow, dependence):
        return None
    if Way.OTHER in dependence.ways or (dependence.ways & RAW and squashed(flow, gate) is None):
        return Reason.GATE_OTHER_INPUTS
    gate = _unexpanded(x, gate)
    if not _fits(x, product.node, gate):
        return Reason.GATE_SHAPE
    found = flow.dependence(x, gate)
    assert found is not None
    if product.addend in (None, x) and response_norm.is_response(flow, x, found):
        return response_norm.match(flow, product, x, gate)
    kind = _kind(x, gate)
    mask = one_plus(gate)
    if kind is Kind.SPATIAL_GATE and mask is not None and product.addend is None:
        match = _gate(kind, product, x, mask, residual=x)
    else:
        match = _gate(kind, product, x, gate)
    if isinstance(match, Reason):
        return match
    match = _with_further_gates(flow, match)
    return replace(match, plane=plane_pools(flow, x, found), pixels=pixel_pools(flow, x, found))


def _is_softmax(gate: Node) -> bool:
    """True for the weights of a softmax, or a part of them: that softmax is where they are looked at."""
    while gate.target in MOVEMENT or packet(gate) in ("expand", "to", "_to_copy"):
        source = gate.args[0]
        if not isinstance(source, Node):
            return False
        gate = source
    return packet(gate) in ("softmax", "_softmax")


def _is_normalization(flow: Dataflow, dependence: Dependence) -> bool:
    """True when the factor shrinks as the map grows, so that their product does not change."""
    once = flow.probe(dependence, dependence.value)
    scaled = flow.probe(dependence, dependence.value, PROBE_SCALE)
    if once is None or scaled is None or not once.any():
        return False
    return torch.allclose(scaled * PROBE_SCALE, once, rtol=1e-2, atol=1e-3 * float(once.abs().mean()))


def _fits(x: Node, product: Node, gate: Node) -> bool:
    """True when the gate broadcasts to x, and not x to the gate."""
    shape, gate_shape = shape_of(x), shape_of(gate)
    if shape != shape_of(product) or len(gate_shape) > len(shape):
        return False
    return all(g in (1, d) for g, d in zip(gate_shape[::-1], shape[::-1], strict=False))


def _kind(x: Node, gate: Node) -> Kind:
    """Per channel when the gate keeps one axis of the map; per pixel or full when it keeps more."""
    shape = shape_of(gate)
    kept = [d for d in shape[max(0, len(shape) - len(shape_of(x)) + 1) :] if d != 1]
    return Kind.CHANNEL_GATE if len(kept) <= 1 else Kind.SPATIAL_GATE


def _unexpanded(x: Node, gate: Node) -> Node:
    """The gate before it was expanded to the map: it broadcasts by itself."""
    while packet(gate) in ("expand", "expand_as") and isinstance(gate.args[0], Node):
        gate = gate.args[0]
    return gate


def _with_further_gates(flow: Dataflow, match: GateMatch) -> GateMatch:
    """x * a * b, with both from pools of x, is one gate: coordinate attention's for rows and columns."""
    while match.residual is None:
        user = only_user(match.result)
        if user is None or user.target is not aten.mul.Tensor:
            break
        gate = user.args[1] if user.args[0] is match.result else user.args[0]
        if not flow.is_runtime(gate) or not isinstance(gate, Node):
            break
        dependence = flow.dependence(match.x, gate)
        if dependence is None or Way.POOLED not in dependence.ways or dependence.ways & (RAW | Way.OTHER):
            break
        gate = _unexpanded(match.x, gate)
        if _is_softmax(gate) or not _fits(match.x, user, gate):
            break
        match = replace(match, kind=Kind.SPATIAL_GATE, gates=(*match.gates, gate), result=user)
    return match


def _with_tail(flow: Dataflow, match: GateMatch, taken: set[Node]) -> GateMatch:
    """The sum and the activation that alone consume the product belong to the gate, unless another gate has them: then
    they are in `taken`, where this one's sum goes too."""
    residual, result = match.residual, match.result
    add = only_user(result)
    if residual is None and add is not None and add.target is aten.add.Tensor and not add.kwargs and add not in taken:
        other = add.args[1] if add.args[0] is result else add.args[0]
        if flow.is_runtime(other) and other is not result and shape_of(other) == shape_of(result):
            residual, result = other, add
            taken.add(add)
    tail = only_user(result)
    activation = ""
    if tail is not None and tail.target in ACTIVATIONS and tail not in taken:
        activation, result = ACTIVATIONS[tail.target], tail
    return replace(match, residual=residual, activation=activation, result=result)
