"""Puts our operators in place of the sites, proves each of them in PyTorch, and undoes one that differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.forms import form_and_operands
from attn_deploy.export.graph import shape_of
from attn_deploy.export.interpret import Run, run
from attn_deploy.export.recognize.site import AttentionMatch, Findings, GateMatch, Kind, Reason, Site, Skipped
from attn_deploy.export.rewrite import attention, gate
from attn_deploy.export.rewrite.editor import Editor
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import FP32_MIN_SQNR_DB, sqnr_db

ops = torch.ops.attn_deploy
SITE_MIN_SQNR_DB = 90.0
"""A rewritten site against the original, both in PyTorch FP32: rounding alone leaves 110 dB and more."""


@dataclass(frozen=True)
class OperatorSite:
    """A recognized site in the rewritten graph. `node` is its operator's node, `operator` its ONNX form; `flops` and
    `bytes` are per sample. `proven` says that parity of the whole model sees it when it is corrupted on purpose."""

    kind: Kind
    module: str
    source_line: str
    node: str
    operator: str
    flops: int
    bytes: int
    proven: bool = True


@dataclass(frozen=True)
class RewrittenModel:
    captured: CapturedModel
    program: ExportedProgram
    sites: tuple[OperatorSite, ...]
    skipped: tuple[Skipped, ...]


def rewrite(captured: CapturedModel, findings: Findings) -> RewrittenModel:
    """The captured model with our operators in it. Every site was compared on two batches and shown to matter."""
    sites, skipped = list(findings.sites), list(findings.skipped)
    while True:
        program, nodes = _apply(captured.program, sites)
        wrong = _first_differing(captured, program, sites, nodes)
        if wrong is None:
            break
        skipped.append(Skipped(wrong.kind, wrong.module, wrong.source_line, Reason.DIFFERS))
        sites = [s for s in sites if s is not wrong]
    placed = [_operator_site(captured, s, n) for s, n in zip(sites, nodes, strict=True)]
    return RewrittenModel(captured, program, tuple(_prove(captured, program, placed)), tuple(skipped))


def _operator_site(captured: CapturedModel, site: Site, node: Node) -> OperatorSite:
    form, operands, attributes = form_and_operands(str(node.target).split(".")[1], node.args)
    shapes = [shape_of(o) for o in operands]
    samples = captured.batch or 1
    return OperatorSite(
        site.kind, site.module, site.source_line, node.name, form.name,
        flops=2 * form.multiply_adds(*shapes, **attributes) // samples,
        bytes=4 * sum(math.prod(s) for s in (*shapes, *form.infer_shapes(*shapes, **attributes))) // samples,
    )  # fmt: skip


def _apply(program: ExportedProgram, sites: Sequence[Site]) -> tuple[ExportedProgram, list[Node]]:
    editor = Editor(program)
    nodes = []
    for site in sites:
        if isinstance(site.match, AttentionMatch):
            nodes.append(attention.rewrite(editor, site.match))
        else:
            assert isinstance(site.match, GateMatch)
            nodes.append(gate.rewrite(editor, site.match))
    return editor.finish(), nodes


def example_tensors(captured: CapturedModel, *, seed: int, extra_batch: int = 0) -> dict[str, Tensor]:
    """Feeds as tensors; `extra_batch` is added to the example batch when it is dynamic."""
    batch = None if captured.batch is None else _within(captured, captured.batch + extra_batch)
    return {k: torch.from_numpy(v) for k, v in make_feeds(captured.inputs, batch=batch, seed=seed).items()}


def _within(captured: CapturedModel, batch: int) -> int:
    bound = captured.dims["batch"].max
    return batch if bound is None else min(batch, bound)


def _first_differing(
    captured: CapturedModel, program: ExportedProgram, sites: Sequence[Site], nodes: Sequence[Node]
) -> Site | None:
    """The first site whose operator gives other numbers than the original's nodes, on two batch sizes. What comes
    behind it is fed with its numbers, so nothing is known of that before it is undone."""
    wrong: set[int] = set()
    for seed, extra in ((0, 0), (1, 1)):
        feeds = example_tensors(captured, seed=seed, extra_batch=extra)
        before = run(captured.program, feeds, record={s.result.name for s in sites})
        after = run(program, feeds, record={n.name for n in nodes})
        for site, node in zip(sites, nodes, strict=True):
            got, expected = after.values[node.name], before.values[site.result.name]
            if isinstance(site.match, AttentionMatch):
                expected = attention.original_layout(expected, got)
            if sqnr_db(expected.numpy(), got.numpy()) < SITE_MIN_SQNR_DB:
                wrong.add(id(site))
        del before, after
    return next((s for s in sites if id(s) in wrong), None)


def _prove(captured: CapturedModel, program: ExportedProgram, sites: Sequence[OperatorSite]) -> list[OperatorSite]:
    """Corrupts each site in turn; one that the whole model's parity does not notice is not proven."""
    smaller = -1 if captured.dims and captured.dims["batch"].min == 1 else 0  # one sample tells, and takes half as long
    feeds = example_tensors(captured, seed=0, extra_batch=smaller)
    clean = run(program, feeds)
    result = []
    for site in sites:
        corrupted = run(program, feeds, override=(site.node, corrupt))
        result.append(replace(site, proven=_visible(clean, corrupted)))
    return result


def _visible(clean: Run, corrupted: Run) -> bool:
    pairs = zip(clean.outputs, corrupted.outputs, strict=True)
    return any(sqnr_db(a.numpy(), b.numpy()) < FP32_MIN_SQNR_DB for a, b in pairs if a.is_floating_point())


def _uniform(query: Tensor, value: Tensor) -> Tensor:
    mean = value.mean(1, keepdim=True)
    return mean.expand(-1, query.shape[1], -1, -1).contiguous()


def _ungated(x: Tensor, gate: Tensor, residual: Tensor | None, activation: str) -> Any:
    flat = gate.mean(tuple(range(1, gate.dim())), keepdim=True).expand_as(gate).contiguous()
    return ops.gate(x, flat, residual, activation)


_CORRUPTIONS: dict[str, Callable[..., Any]] = {
    "attention": lambda query, key, value, *rest: _uniform(query, value),
    "packed_attention": lambda qkv, *rest: _uniform(qkv[:, :, 0], qkv[:, :, 2]).flatten(2),
    "gate": _ungated,
}


def corrupt(node: Node, args: tuple[Any, ...]) -> Any:
    """The operator's result with its attention taken out: a plain mean of the values, a gate that does not choose."""
    return _CORRUPTIONS[str(node.target).split(".")[1]](*args)
