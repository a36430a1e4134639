"""Each site of a lowered model alone, to be fed with the reference's values: nothing is added to the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.cut import Cutter, is_integer
from attn_deploy.export.forms import form_and_operands
from attn_deploy.export.interpret import run
from attn_deploy.export.lower.cpu_units import fuse_units
from attn_deploy.export.rewrite import RewrittenModel
from attn_deploy.export.rewrite.apply import example_tensors
from attn_deploy.ops import DOMAIN, FORMS, quantized_map
from attn_deploy.parity import SiteCase
from attn_deploy.session import Array


@dataclass(frozen=True)
class SiteRecord:
    """The operands of a site's operator and its result in PyTorch, in the order of the ONNX form's inputs."""

    operands: tuple[Array, ...]
    result: Array


def record_sites(rewritten: RewrittenModel) -> dict[str, SiteRecord]:
    """By node of the rewritten graph, on the example batch."""
    names = {site.node for site in rewritten.sites}
    done = run(rewritten.program, example_tensors(rewritten.captured, seed=21), record=names)
    operators = {n.name: str(n.target).split(".")[1] for n in rewritten.program.graph.nodes if n.name in names}
    records = {}
    for name in names:
        _, operands, _ = form_and_operands(operators[name], done.arguments[name])
        arrays = tuple(t.numpy() for t in operands if isinstance(t, torch.Tensor))
        records[name] = SiteRecord(arrays, done.values[name].numpy())
    return records


def site_cases(canonical: CanonicalModel, lowered: ir.Model, records: Mapping[str, SiteRecord]) -> Iterator[SiteCase]:
    """A small model for each site, cut out of `lowered` between the operator's inputs and its output by their names; of
    a site that is part of another operator, that operator alone."""
    nodes = {str(n.name): n for n in canonical.model.graph}
    cutter, floating = Cutter(lowered), _Floating(canonical)
    values = {str(o.name): o for n in lowered.graph for o in n.outputs}
    for site in canonical.sites:
        operator, record = nodes[site.node], records[site.fx_node]
        holder = _holder(lowered, operator)
        if holder is not None and FORMS[holder.op_type].operator == "QuantizedGate":
            yield _on_levels(cutter, site.module, holder, record)
            continue
        if holder is not None:
            yield _within(cutter, site.module, operator, holder, record, floating)
            continue
        names = [str(i.name) for i in operator.inputs if i is not None]
        result = values[str(operator.outputs[0].name)]
        arrays = dict(zip(names, record.operands, strict=True))
        part = cutter.part(result, arrays)
        feeds = {name: arrays[name] for name in part.input_names}
        yield SiteCase(site.module, cutter.model_of(part, feeds), feeds, record.result, part.arithmetic)


def _holder(lowered: ir.Model, operator: ir.Node) -> ir.Node | None:
    """The operator of ours in `lowered` that does the site's work and more, or reads its operands in another form."""
    for node in lowered.graph:
        named = node.name == operator.name or str(node.name).startswith(f"{operator.name}/")
        if named and node.domain == DOMAIN and node.op_type != operator.op_type:
            return node
    return None


class _Floating:
    """The same model in FP32, as coarse as can be: an operator with an INT8 form in it is compared with the one there,
    whose weights are the model's own."""

    def __init__(self, canonical: CanonicalModel) -> None:
        self._canonical = canonical

    @cached_property
    def _nodes(self) -> dict[str, ir.Node]:
        model = self._canonical.model.clone()
        fuse_units(model, frozenset(FORMS), None)
        return {str(node.name): node for node in model.graph}

    def of(self, holder: ir.Node) -> ir.Node:
        """The operator itself where it is in floating point."""
        if not is_integer(holder.op_type):
            return holder
        return self._nodes[str(holder.name).replace("/Quantized", "/")]


def _on_levels(cutter: Cutter, module: str, holder: ir.Node, record: SiteRecord) -> SiteCase:
    """A gate on 8-bit maps is fed with the levels of the reference's operands, and compared with its result in units of
    levels."""
    inputs = dict(zip((i.name for i in FORMS[holder.op_type].inputs), holder.inputs, strict=True))
    constants = {
        name: _array(value, {}) for name, value in inputs.items() if value is not None and value.const_value is not None
    }

    def levels(name: str, array: Array) -> Array:
        return quantized_map.levels_of(
            array.transpose(0, 2, 3, 1), constants[f"{name}_scale"], constants[f"{name}_zero"]
        )

    feeds = {}
    for name, array in zip(("x", "gate", "residual"), record.operands, strict=False):
        feeds[str(inputs[name].name)] = array if name == "gate" else levels(name, array)  # type: ignore[union-attr]
    steps = record.result.transpose(0, 2, 3, 1) / constants["y_scale"] + constants["y_zero"]
    expected = np.clip(steps, 0, quantized_map.LEVELS).astype(np.float32)
    part = cutter.part(holder.outputs[0], set(feeds))
    return SiteCase(module, cutter.model_of(part, feeds), feeds, expected, part.arithmetic)


def _within(
    cutter: Cutter, module: str, operator: ir.Node, holder: ir.Node, record: SiteRecord, floating: _Floating
) -> SiteCase:
    """PackedAttention in place of Attention is fed with the reference's query, key and value as one. A whole block is
    fed with random rows, as its norm takes any, and compared with the float64 reference of the operator in FP32."""
    others = {str(i.name): a for i, a in zip(operator.inputs, record.operands, strict=True) if i is not None}
    first = holder.inputs[0]
    assert first is not None
    if FORMS[holder.op_type].operator == "PackedAttention":
        feeds, expected = {str(first.name): np.stack(record.operands[:3], axis=2)}, record.result
    else:
        batch, tokens = record.operands[0].shape[:2]
        channels = holder.inputs[1].const_value.shape[0]  # type: ignore[union-attr]
        x = np.random.default_rng(23).standard_normal((batch, tokens, int(channels)), np.float32)
        reference = floating.of(holder)
        operands = [x, *(_array(i, others) for i in reference.inputs[1:] if i is not None)]
        attributes = {name: a.value for name, a in reference.attributes.items()}
        feeds = {str(first.name): x}
        expected = FORMS[reference.op_type].reference(*operands, **attributes)[0].astype(np.float32)
    part = cutter.part(holder.outputs[0], {str(i.name) for i in holder.inputs if i is not None})
    feeds |= {name: others[name] for name in part.input_names if name not in feeds}
    return SiteCase(module, cutter.model_of(part, feeds), feeds, expected, part.arithmetic)


def _array(value: ir.Value, arrays: Mapping[str, Array]) -> Array:
    return arrays[str(value.name)] if value.const_value is None else value.const_value.numpy()
