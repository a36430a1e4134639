"""Each site of a lowered model alone, to be fed with the reference's values: nothing is added to the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from attn_deploy.export.cut import Cutter
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
    cutter = Cutter(lowered)
    values = {str(o.name): o for n in lowered.graph for o in n.outputs}
    for site in canonical.sites:
        operator, record = nodes[site.node], records[site.fx_node]
        names = [str(i.name) for i in operator.inputs if i is not None]
        result = values[str(operator.outputs[0].name)]
        arrays = dict(zip(names, record.operands, strict=True))
        part = cutter.part(result, arrays)
        feeds = {name: arrays[name] for name in part.input_names}
        yield SiteCase(site.module, cutter.model_of(part, feeds), feeds, record.result)
