"""Each site of a lowered model alone, to be fed with the reference's values: nothing is added to the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from attn_deploy.export.forms import form_and_operands
from attn_deploy.export.interpret import run
from attn_deploy.export.rewrite import RewrittenModel
from attn_deploy.export.rewrite.apply import example_tensors
from attn_deploy.export.to_onnx import CanonicalModel
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
    """A small model for each site, cut out of `lowered` between the operator's inputs and its output by their names."""
    nodes = {str(n.name): n for n in canonical.model.graph}
    values = {str(o.name): o for n in lowered.graph for o in n.outputs}
    for site in canonical.sites:
        operator, record = nodes[site.node], records[site.fx_node]
        names = [str(i.name) for i in operator.inputs if i is not None]
        result = values[str(operator.outputs[0].name)]
        arrays = dict(zip(names, record.operands, strict=True))
        model, used = _cut(lowered, result, arrays)
        yield SiteCase(site.module, ir.to_proto(model).SerializeToString(), {n: arrays[n] for n in used}, record.result)


def _cut(lowered: ir.Model, result: ir.Value, boundary: Mapping[str, Array]) -> tuple[ir.Model, list[str]]:
    """The nodes between the boundary's values and `result` as a model; the names of the inputs it has."""
    inputs: dict[str, ir.Value] = {}
    initializers: dict[str, ir.Value] = {}
    copies: dict[ir.Value, ir.Value] = {}
    order: list[ir.Node] = []
    kept: set[ir.Node] = set()

    def visit(value: ir.Value) -> None:
        pending = [value]
        while pending:
            current = pending.pop()
            name = str(current.name)
            producer = current.producer()
            if current in copies or (producer is not None and producer in kept):
                continue
            if current.is_initializer():
                copies[current] = initializers[name] = ir.Value(name=name, const_value=current.const_value)
            elif name in boundary or producer is None:
                array = boundary[name]
                dtype = ir.DataType.from_numpy(np.asarray(array).dtype)
                shape = ir.Shape([None] * array.ndim)
                copies[current] = inputs[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
            else:
                kept.add(producer)
                pending.extend(i for i in producer.inputs if i is not None)

    visit(result)
    for node in lowered.graph:
        if node not in kept:
            continue
        outputs = []
        for output in node.outputs:
            copies[output] = ir.Value(name=output.name, shape=output.shape, type=output.type)
            outputs.append(copies[output])
        operands = [None if i is None else copies[i] for i in node.inputs]
        order.append(
            ir.Node(
                node.domain, node.op_type, operands, list(node.attributes.values()), outputs=outputs, name=node.name
            )
        )
    final = copies[result]
    final.type = final.type or ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        list(inputs.values()), [final], nodes=order, initializers=list(initializers.values()),
        opset_imports=dict(lowered.graph.opset_imports), name="site",
    )  # fmt: skip
    functions = [f.clone() if hasattr(f, "clone") else f for f in lowered.functions.values()]
    return ir.Model(graph, ir_version=lowered.ir_version, functions=functions), list(inputs)
