"""Puts our operators in place of the sites, proves each of them in PyTorch, and undoes one that differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.forms import form_and_operands
from attn_deploy.export.graph import shape_of
from attn_deploy.export.interpret import Run, RunError, run
from attn_deploy.export.recognize.attention import AttentionMatch
from attn_deploy.export.recognize.branch import BranchesMatch, BranchMatch
from attn_deploy.export.recognize.channel_attention import ChannelAttentionMatch
from attn_deploy.export.recognize.context import ContextMatch
from attn_deploy.export.recognize.gate import GateMatch
from attn_deploy.export.recognize.hard import HardMatch
from attn_deploy.export.recognize.regions import settle
from attn_deploy.export.recognize.response_norm import ResponseNormMatch
from attn_deploy.export.recognize.site import Findings, Kind, Reason, Site, Skipped
from attn_deploy.export.rewrite import attention, branch, channel_attention, context, gate, hard, response_norm
from attn_deploy.export.rewrite.corruption import corrupt
from attn_deploy.export.rewrite.editor import Editor, FixedSize
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import FP32_MIN_SQNR_DB, other_length, sqnr_db
from attn_deploy.session import BATCH, SEQUENCE

REWRITERS: dict[type, Any] = {
    AttentionMatch: attention,
    ChannelAttentionMatch: channel_attention,
    ContextMatch: context,
    BranchMatch: branch,
    BranchesMatch: branch,
    HardMatch: hard,
    GateMatch: gate,
    ResponseNormMatch: response_norm,
}
"""Match -> the module that rewrites it: `rewrite(editor, match)` puts the operator in and returns its node;
`original_layout(match, value, like)` lays the original's value out as the operator's result, to be compared."""

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
    sqnr_db: float
    """Against the original's nodes in PyTorch, the worse of the examples tried; inf where they are equal."""
    proven: bool = True


@dataclass(frozen=True)
class RewrittenModel:
    captured: CapturedModel
    program: ExportedProgram
    sites: tuple[OperatorSite, ...]
    skipped: tuple[Skipped, ...]


def rewrite(captured: CapturedModel, findings: Findings) -> RewrittenModel:
    """The captured model with our operators in it. Every site was compared on two batches, of two sequence lengths
    where that is dynamic, and shown to matter."""
    found, skipped = list(findings.sites), list(findings.skipped)
    opened: set[Node] = set()
    while True:
        sites = settle(found, opened)
        try:
            program, nodes, exits = _apply(captured, sites)
            fidelity, moved = _compare(captured, program, sites, nodes, exits)
        except _FixedLengthError as error:
            skipped.append(_undone(error.site, Reason.FIXED_LENGTH))
            found = [s for s in found if s.result is not error.site.result]
            continue
        # What comes behind a wrong site is fed with its numbers: nothing is known of that before it is undone.
        wrong = next((s for s, db in zip(sites, fidelity, strict=True) if db < SITE_MIN_SQNR_DB), None)
        if wrong is not None:
            skipped.append(_undone(wrong, Reason.DIFFERS))
            found = [s for s in found if s.result is not wrong.result]
        elif moved:
            opened |= moved
        else:
            break
    placed = [_operator_site(captured, *each) for each in zip(sites, nodes, fidelity, strict=True)]
    return RewrittenModel(captured, program, tuple(_prove(captured, program, placed)), tuple(skipped))


def _undone(site: Site, reason: Reason) -> Skipped:
    return Skipped(site.kind, site.module, site.source_line, reason, site.anchor)


class _FixedLengthError(Exception):
    """Raised for a site whose operator would hold for one sequence length only."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.module)
        self.site = site


def _operator_site(captured: CapturedModel, site: Site, node: Node, fidelity: float) -> OperatorSite:
    form, operands, attributes = form_and_operands(str(node.target).split(".")[1], node.args)
    shapes = [shape_of(o) for o in operands]
    samples = captured.batch or 1
    return OperatorSite(
        site.kind, site.module, site.source_line, node.name, form.name,
        flops=2 * form.multiply_adds(*shapes, **attributes) // samples,
        bytes=4 * sum(math.prod(s) for s in (*shapes, *form.infer_shapes(*shapes, **attributes))) // samples,
        sqnr_db=fidelity,
    )  # fmt: skip


def _apply(captured: CapturedModel, sites: Sequence[Site]) -> tuple[ExportedProgram, list[Node], dict[Node, Node]]:
    """The rewritten program, the operator of each site, and what took the place of each movement that was left out."""
    batch = captured.batch or captured.inputs[0].shape[0]
    editor = Editor(captured.program, batch, keep_sizes=captured.sequence is not None)
    nodes = []
    for site in sites:
        with _made_for(editor, site):
            nodes.append(REWRITERS[type(site.match)].rewrite(editor, site.match))
    for site in sites:
        if isinstance(site.match, AttentionMatch):
            with _made_for(editor, site):
                attention.finish(editor, site.match)
    return editor.finish(), nodes, {node: editor.at(node) for node in editor.left}


@contextmanager
def _made_for(editor: Editor, site: Site) -> Iterator[None]:
    editor.site = site
    try:
        yield
    except FixedSize as error:
        raise _FixedLengthError(site) from error
    finally:
        editor.site = None


def example_tensors(
    captured: CapturedModel, *, seed: int, extra_batch: int = 0, other_sequence: bool = False
) -> dict[str, Tensor]:
    """Feeds as tensors; `extra_batch` is added to the example batch when it is dynamic. With `other_sequence` they are
    of another sequence length than the example when that is dynamic."""
    batch = None if captured.batch is None else captured.dims[BATCH].within(captured.batch + extra_batch)
    sequence = captured.sequence
    if sequence is not None and other_sequence:
        sequence = other_length(sequence, captured.dims[SEQUENCE])
    feeds = make_feeds(captured.inputs, batch=batch, seed=seed, sequence=sequence)
    return {k: torch.from_numpy(v) for k, v in feeds.items()}


def _compare(
    captured: CapturedModel,
    program: ExportedProgram,
    sites: Sequence[Site],
    nodes: Sequence[Node],
    exits: Mapping[Node, Node],
) -> tuple[list[float], set[Node]]:
    """The SQNR in dB of every site's operator against the original's nodes, the worse of two batch sizes and sequence
    lengths; and the results behind which what stayed in the natural order of tokens differs."""
    worst = [math.inf] * len(sites)
    moved: set[Node] = set()
    leaving = {e: s.result for s in sites if isinstance(s.match, AttentionMatch) for e in s.match.exits}
    for seed, extra in ((0, 0), (1, 1)):
        feeds = example_tensors(captured, seed=seed, extra_batch=extra, other_sequence=bool(extra))
        before = run(captured.program, feeds, record={n.name for n in (*leaving, *(s.result for s in sites))})
        try:
            after = run(program, feeds, record={n.name for n in (*nodes, *exits.values())})
        except RunError as error:
            raise _FixedLengthError(_site_before(program, error.node, sites)) from error
        for number, (site, node) in enumerate(zip(sites, nodes, strict=True)):
            got, expected = after.values[node.name], before.values[site.result.name]
            expected = REWRITERS[type(site.match)].original_layout(site.match, expected, got)
            worst[number] = min(worst[number], sqnr_db(expected.numpy(), got.numpy()))
        for node, result in leaving.items():
            got = after.values.get(exits[node].name)  # a reshape that restored a shape is gone
            if got is not None and sqnr_db(before.values[node.name].numpy(), got.numpy()) < SITE_MIN_SQNR_DB:
                moved.add(result)
        if not _same_outputs(before, after):
            moved |= set(leaving.values())
        del before, after
    return worst, moved


def _same_outputs(before: Run, after: Run) -> bool:
    """As parity of the whole model takes it: rounding grows on the way to the outputs."""
    pairs = zip(before.outputs, after.outputs, strict=True)
    return all(sqnr_db(a.numpy(), b.numpy()) >= FP32_MIN_SQNR_DB for a, b in pairs if a.is_floating_point())


def _site_before(program: ExportedProgram, node: Node, sites: Sequence[Site]) -> Site:
    """The site that a node was made for, or that of the closest made node before it: a shape went wrong there."""
    found = sites[0]
    for current in program.graph.nodes:
        found = current.meta.get("site") or found
        if current.name == node.name:
            break
    return found


def _prove(captured: CapturedModel, program: ExportedProgram, sites: Sequence[OperatorSite]) -> list[OperatorSite]:
    """Corrupts each site in turn; one that the whole model's parity does not notice is not proven."""
    smaller = -1 if BATCH in captured.dims else 0  # one sample tells, and takes half as long
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
