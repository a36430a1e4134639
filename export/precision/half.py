"""FP16 and BF16 as strongly typed graphs: each node is half or FP32, with a Cast wherever a value changes sides.

TensorRT 11 takes precision from the types in the graph alone, and ONNX Runtime's CUDA kernels are chosen by them. The
model's inputs and outputs stay FP32. Which nodes stay FP32 is told by half_rules.py.

With INT8: int8_symmetric first, on the FP32 graph, then `to_half` on its result; scales and what is not quantized
become half.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.half_masks import Masks, find_masks
from attn_deploy.export.precision.half_rules import (
    HalfKernels,
    Kept,
    Reasons,
    reads_any_float,
    rules,
    unknown_names,
)
from attn_deploy.export.precision.half_types import (
    HALF_TYPES,
    Operands,
    half_operands,
    is_float,
    prepare,
    rounded,
)
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.target import Precision, nearest


@dataclass(frozen=True)
class KeptNode:
    """A node that stays FP32. `detail`: the number behind the reason."""

    node: str
    operator: str
    reason: Kept
    detail: str = ""

    @property
    def module(self) -> str:
        """The module path: the name up to the operator; empty at the top level."""
        head, slash, _ = self.node.partition("/")
        return head if slash else ""


@dataclass(frozen=True)
class HalfPlan:
    """What `to_half` did. `clamped`: names of mask constants that the type could not hold. `casts`: how many there are
    now. `unmeasured`: float activations that a half node reads or makes and that no magnitude was given for."""

    precision: Precision
    kept: tuple[KeptNode, ...]
    clamped: tuple[str, ...]
    casts: int
    unmeasured: tuple[str, ...]

    def reason(self, node: str) -> Kept | None:
        return next((k.reason for k in self.kept if k.node == node), None)

    @property
    def by_module(self) -> dict[str, tuple[KeptNode, ...]]:
        """The kept nodes by module path, in graph order."""
        modules: dict[str, list[KeptNode]] = {}
        for kept in self.kept:
            modules.setdefault(kept.module, []).append(kept)
        return {module: tuple(nodes) for module, nodes in modules.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the asked precision was not kept, and why: a line for each module and reason."""
        lines = []
        for module, nodes in self.by_module.items():
            for reason in dict.fromkeys(n.reason for n in nodes):
                same = [n for n in nodes if n.reason is reason]
                operators = ", ".join(dict.fromkeys(n.operator for n in same))
                details = list(dict.fromkeys(n.detail for n in same if n.detail))
                more = f" and {len(details) - 1} more" if len(details) > 1 else ""
                detail = f" ({details[0]}{more})" if details else ""
                lines.append(f"{module or '(top level)'}: {operators} in float32: {reason}{detail}")
        return tuple(lines)


def to_half(
    model: ir.Model,
    precision: Precision,
    magnitudes: Mapping[str, float],
    *,
    keep: Collection[str] = (),
    lossy: Mapping[str, str] | None = None,
    kernels: HalfKernels | None = None,
) -> HalfPlan:
    """Makes a half graph of an FP32 one, in place.

    `magnitudes`: max |x| by value name on calibration data (half_ranges.py); BF16 asks for none. `keep`: node names and
    module paths that stay FP32. `lossy`: node name -> what was measured of its block (half_loss.py). `kernels`: what
    the target can run. Raises UsageError for a precision that is not half, or a name in `keep` that the model lacks.
    """
    half = HALF_TYPES.get(precision)
    if half is None:
        raise UsageError("a half graph is FP16 or BF16", got=precision, expected="fp16 or bf16")
    for name in unknown_names(model, keep):
        known = {str(n.name).partition("/")[0] for n in model.graph}
        raise UsageError("no module or node of this name to keep in float32", got=name, expected=nearest(name, known))
    kernels = kernels or HalfKernels()
    opset = prepare(model, half)
    masks = find_masks(model)
    forced = {name: (Kept.LOSS, detail) for name, detail in (lossy or {}).items()}
    forced |= {name: (Kept.REQUESTED, "") for name in _named(model, keep)}
    reasons = rules(model, half, opset, magnitudes, kernels, masks, forced)
    unmeasured = _unmeasured(model, reasons, magnitudes) if half == ir.DataType.FLOAT16 else ()
    typing = _Typing(model, half, opset, reasons, masks, kernels)
    typing.apply()
    kept = tuple(KeptNode(str(n.name), n.op_type, *why) for n, why in reasons.items())
    casts = sum(n.op_type == "Cast" for n in model.graph)
    return HalfPlan(precision, kept, tuple(typing.clamped), casts, unmeasured)


def _named(model: ir.Model, keep: Collection[str]) -> list[str]:
    found = []
    for node in model.graph:
        name = str(node.name)
        module = name.partition("/")[0] if "/" in name else ""
        if name in keep or any(module == k or module.startswith(f"{k}.") for k in keep):
            found.append(name)
    return found


def _unmeasured(model: ir.Model, reasons: Reasons, magnitudes: Mapping[str, float]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for node in model.graph:
        if node not in reasons and "QuantizeLinear" not in node.op_type and "DequantizeLinear" not in node.op_type:
            floats = (v for v in (*node.inputs, *node.outputs) if v is not None and is_float(v))
            names.update((str(v.name), None) for v in floats if v.const_value is None and v.name not in magnitudes)
    return tuple(names)


class _Typing:
    """Gives every value its type. A value keeps its name in the type that it is made in; its copy in the other type
    is called `name/float16`, `name/bfloat16` or `name/float32`, made once for all of its readers."""

    def __init__(
        self, model: ir.Model, half: ir.DataType, opset: int, reasons: Reasons, masks: Masks, kernels: HalfKernels
    ) -> None:
        self._model, self._half, self._masks = model, half, masks
        self._operands: dict[ir.Node, Operands] = {}
        for node in model.graph:
            if node not in reasons and (found := half_operands(node, half, opset, kernels.own)) is not None:
                self._operands[node] = found
        self._copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.clamped: list[str] = []

    def apply(self) -> None:
        nodes = list(self._model.graph)
        for node in nodes:
            self._drop_idle_cast(node)
        nodes = [n for n in nodes if n.graph is not None]
        reads = [(node, i, v) for node in nodes for i, v in enumerate(node.inputs) if is_float(v)]
        inner = [use for node in nodes for use in _read_inside(node)]
        for node in nodes:
            for index in self._of(node).outputs:
                node.outputs[index].type = ir.TensorType(self._half)
            self._state_type(node)
        for node, index, value in reads:
            assert value is not None
            half = index in self._of(node).inputs
            if reads_any_float(node) and value.const_value is None:
                continue
            wanted = self._half if half else ir.DataType.FLOAT
            if value.is_initializer():
                if half:
                    node.replace_input_with(index, self._constant(value, (node, index)))
            elif value.dtype != wanted:
                node.replace_input_with(index, self._cast(value, wanted, node))
        for node, index, value, outer in inner:
            if value.dtype == self._half:
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT, outer))
        self._restore_outputs()
        self._remove_unread()
        drop_unused_initializers(self._model)

    def _of(self, node: ir.Node) -> Operands:
        return self._operands.get(node, Operands(frozenset(), frozenset()))

    def _drop_idle_cast(self, node: ir.Node) -> None:
        """A Cast from FP32 to FP32, as torch.onnx leaves behind, would come to stand behind another."""
        source = node.inputs[0] if node.inputs else None
        output = node.outputs[0]
        if node.op_type == "Cast" and is_float(source) and is_float(output) and not output.is_graph_output():
            assert source is not None
            output.replace_all_uses_with(source)
            self._model.graph.remove(node, safe=True)
            self._operands.pop(node, None)

    def _state_type(self, node: ir.Node) -> None:
        """Attributes that name the type of the result, or the precision of statistics."""
        if not self._of(node).outputs:
            return
        for name in ("to", "dtype", "output_dtype"):
            if name in node.attributes and node.attributes[name].as_int():
                node.attributes[name] = ir.AttrInt64(name, int(self._half))
        if node.op_type == "ConstantOfShape":
            value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(rounded(value, self._half)))
        if node.op_type in ("LayerNormalization", "RMSNormalization") and "stash_type" in node.attributes:
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(ir.DataType.FLOAT))

    def _constant(self, value: ir.Value, use: tuple[ir.Node, int]) -> ir.Value:
        """The constant in the half type; a mask as the type can hold it."""
        assert value.const_value is not None
        mask = use in self._masks.constants
        label = self._half.name.lower()
        if mask and use in self._masks.added:
            label += "/added"
        key = f"{value.name}/{label}"
        if key in self._model.graph.initializers:
            return self._model.graph.initializers[key]
        array = value.const_value.numpy()
        if mask:
            held = self._masks.clamped(array, use, self._half)
            if not np.array_equal(held, array):
                self.clamped.append(str(value.name))
            array = held
        tensor = ir.tensor(rounded(array, self._half), name=key)
        half = ir.Value(name=key, const_value=tensor, shape=value.shape, type=ir.TensorType(self._half))
        self._model.graph.register_initializer(half)
        return half

    def _cast(self, value: ir.Value, to: ir.DataType, reader: ir.Node | None) -> ir.Value:
        """The value in the other type. What a Cast made from something else is made from it anew: casts never stand
        behind one another."""
        made = self._copies.get((value, to))
        if made is None:
            producer = value.producer()
            source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
            label = to.name.lower()
            root = producer or reader
            name = f"{root.name if root is not None else value.name}/Cast_{label}"
            if producer is None or len(producer.outputs) > 1:
                name += f"_{value.name}"
            made = ir.Value(name=f"{value.name}/{label}", shape=value.shape, type=ir.TensorType(to))
            cast = ir.node("Cast", [source], {"to": int(to)}, outputs=[made], name=name)
            if producer is not None:
                self._model.graph.insert_after(producer, cast)
            else:
                self._model.graph.insert_before(self._model.graph[0], cast)
            self._copies[value, to] = made
        return made

    def _restore_outputs(self) -> None:
        """Outputs of the model are FP32 under their own names."""
        outputs = self._model.graph.outputs
        for index, output in enumerate(list(outputs)):
            if output.dtype != self._half:
                continue
            name = output.name
            cast = self._cast(output, ir.DataType.FLOAT, None)
            outputs[index] = cast
            output.name = f"{name}/{self._half.name.lower()}"
            cast.name, cast.shape = name, output.shape

    def _remove_unread(self) -> None:
        """Casts whose only readers took another copy."""
        for node in reversed(self._model.graph):
            output = node.outputs[0]
            if node.op_type == "Cast" and not output.uses() and not output.is_graph_output():
                self._model.graph.remove(node, safe=True)


def _read_inside(node: ir.Node) -> list[tuple[ir.Node, int, ir.Value, ir.Node]]:
    """Floats of the outer graph that a node's own graphs read: (inner node, input, value, node)."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            for inner in graph.all_nodes():
                for index, value in enumerate(inner.inputs):
                    if value is not None and is_float(value) and value.graph is node.graph:
                        found.append((inner, index, value, node))
    return found
