"""What each attention site weights with: read as extra outputs of the portable model, which is not under test."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from attn_deploy.ops import FORMS
from attn_deploy.session import Array


@dataclass(frozen=True)
class Observed:
    """`weights` of one site: of a softmax with its axis last, of a gate as it multiplies, of a hard choice 1 for the
    tokens chosen. `index` [windows, length] says which token is where in the windows, when the site has such a map.
    `chosen`: its tokens were chosen from others before, so that they lie on no grid."""

    node: str
    operator: str
    weights: Array
    index: Array | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Watch:
    """Where the weights of a site are in the portable model. `axis` of the softmax; None for what is no softmax."""

    node: str
    operator: str
    value: str
    axis: int | None = None
    index: Array | None = None
    best: int | None = None
    chosen: bool = False

    def observed(self, value: Array) -> Observed:
        if self.best is not None:
            chosen = np.argsort(-value, axis=-1, kind="stable")[..., : self.best]
            value = np.zeros_like(value)
            np.put_along_axis(value, chosen, 1.0, axis=-1)
        if self.axis is not None:
            value = np.moveaxis(value, self.axis, -1)
        return Observed(self.node, self.operator, value, self.index, self.chosen)


def watch_sites(canonical: ir.Model, portable: ir.Model, sites: Collection[str]) -> list[Watch]:
    """Those of the sites (names of operators in `canonical`) that have weights to look at, in graph order."""
    watches = []
    for node in canonical.graph:
        if node.name in sites:
            watch = _watch(node, [n for n in portable.graph if str(n.name).startswith(f"{node.name}/")])
            if watch is not None:
                watches.append(replace(watch, chosen=_comes_from_a_choice(node)))
    return watches


def _comes_from_a_choice(node: ir.Node) -> bool:
    seen: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in seen:
                continue
            if producer.op_type in ("HardAttention", "TopK"):
                return True
            seen.add(producer)
            pending.append(producer)
    return False


def _watch(node: ir.Node, body: Sequence[ir.Node]) -> Watch | None:
    form = FORMS[node.op_type]
    operands = dict(zip((i.name for i in form.inputs), node.inputs, strict=True))
    if form.operator == "Gate":
        return Watch(str(node.name), form.operator, _name(operands["gate"]))
    if form.operator == "HardAttention":
        return Watch(str(node.name), form.operator, _name(operands["scores"]), best=node.attributes["k"].as_int())
    softmax = next((n for n in body if n.op_type == "Softmax"), None)
    if softmax is None:
        return None
    made = {str(o.name) for n in body for o in n.outputs}
    masked = f"{node.name}/p"  # behind the softmax where a fully masked row is cut to 0
    value = masked if masked in made else _name(softmax.outputs[0])
    index = operands.get("index")
    constant = index.const_value if index is not None else None
    return Watch(
        str(node.name), form.operator, value, axis=softmax.attributes.get_int("axis", -1),
        index=None if constant is None else constant.numpy(),
    )  # fmt: skip


def _name(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name)


def with_outputs(portable: ir.Model, names: Collection[str]) -> bytes:
    """The model with the named values as its outputs, serialized."""
    copy = portable.clone()
    values = {str(o.name): o for node in copy.graph for o in node.outputs} | {str(i.name): i for i in copy.graph.inputs}
    copy.graph.outputs.clear()
    for name in dict.fromkeys(names):
        value = values[name]
        value.type, value.shape = value.type or ir.TensorType(ir.DataType.FLOAT), None
        copy.graph.outputs.append(value)
    return ir.to_proto(copy).SerializeToString()


def observe(watches: Sequence[Watch], outputs: Mapping[str, Array]) -> list[Observed]:
    """From the outputs of a run of the model that `with_outputs` gives."""
    return [watch.observed(outputs[watch.value]) for watch in watches]
