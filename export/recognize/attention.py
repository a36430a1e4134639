"""Scaled dot-product attention: a scaled_dot_product_attention node, or a softmax between two matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import (
    aten,
    constants,
    evaluate,
    is_constant,
    module_path,
    only_user,
    shape_of,
    source_line,
)
from attn_deploy.export.recognize.layout import Layout, Tokens
from attn_deploy.export.recognize.operands import (
    Rotary,
    normalized_source,
    rotary_source,
    unrepeated,
    upright,
    without_scales,
)
from attn_deploy.export.recognize.placement import Part, Place, ResultCoordinates, head_count, place, read_part
from attn_deploy.export.recognize.scores import MASKED, MIXERS, PLAIN, PRODUCTS, NoMatch, read_scores
from attn_deploy.export.recognize.site import Kind, Reason, Site, Skipped
from attn_deploy.export.recognize.streams import same_stream

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})


@dataclass(frozen=True)
class Operand:
    """Query, key or value: `node` is [..., length, head_dim], or [..., head_dim, length] when `transposed`.

    `heads` is given where it has fewer than the scores; `rotary` where a rotary embedding ends in it.
    """

    node: Node
    transposed: bool = False
    heads: int | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class AttentionMatch:
    """softmax(cap(scale * query key^T) + bias) value, where the mask allows.

    `lead` are the axes before [query_len, key_len] of the scores at the example batch; matrix number m of them all is
    head m % `heads`.
    `constant_bias` is [windows, heads|1, query_len, key_len], finite: one for all, or one for each window of a sample.
    `bias` or `mask` is a run-time node that broadcasts to scores of `operand_rank` axes; `inverted_mask` says that the
    mask is true where a key is hidden.
    `head_scale` [heads] says that scores are cosines times it. `result` is replaced; with `transposed_result` it is
    [..., head_dim, query_len]. `place` is known for self-attention on one packed tensor, or three alike: in the natural
    order of tokens where sites can stay in it, else in the sources' own; `local_place` is always the latter. `exits`
    are the movements behind the result that restore the natural order (see regions.py).
    """

    query: Operand
    key: Operand
    value: Operand
    result: Node
    lead: tuple[int, ...]
    heads: int
    scale: float
    causal: bool = False
    softcap: float = 0.0
    head_scale: Tensor | None = None
    constant_bias: Tensor | None = None
    bias: Node | None = None
    mask: Node | None = None
    inverted_mask: bool = False
    operand_rank: int = 4
    transposed_result: bool = False
    place: Place | None = None
    local_place: Place | None = None
    layout: Layout | None = None
    exits: tuple[Node, ...] = ()

    @property
    def lengths(self) -> tuple[int, int]:
        """(query_len, key_len) at the example batch."""
        query, key = shape_of(self.query.node), shape_of(self.key.node)
        return query[-1 if self.query.transposed else -2], key[-1 if self.key.transposed else -2]


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every scaled_dot_product_attention and every softmax of the graph, as a site or a skip."""
    finder = _Finder(captured)
    for node in captured.program.graph.nodes:
        finder.layout.tokens(node)  # in the graph's order, so that no way back is long
        if node.target is SDPA:
            matcher = finder.match_sdpa
        elif node.target in SOFTMAX:
            matcher = finder.match_softmax
        else:
            continue
        where = module_path(node), source_line(node)
        try:
            match, kind = finder.finish(matcher(node))
        except NoMatch as no:
            kind = Kind.SOFTMAX if no.reason is Reason.NOT_BETWEEN_PRODUCTS else Kind.SELF_ATTENTION
            yield Skipped(kind, *where, no.reason, node)
            continue
        yield Site(kind, *where, match, node)


class _Finder:
    def __init__(self, captured: CapturedModel) -> None:
        self.known = constants(captured.program)
        self.layout = Layout(self.known)
        self.batch = captured.batch or captured.inputs[0].shape[0]
        self.fixed_length = captured.sequence is None

    def match_sdpa(self, node: Node) -> AttentionMatch:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        bound = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value = (Operand(bound[name]) for name in names[:3])
        shapes = [shape_of(o.node) for o in (query, key, value)]
        if len({len(s) for s in shapes}) != 1 or len(shapes[0]) < 3:
            raise NoMatch(Reason.RANK)
        if shapes[1][:-2] != shapes[0][:-2]:
            key, value = (replace(o, heads=shape_of(o.node)[-3]) for o in (key, value))
        scale = bound.get("scale")
        match = AttentionMatch(
            query, key, value, node, lead=shapes[0][:-2], heads=self._head_count(shapes[0][:-2], value, key, query),
            scale=float(scale) if scale is not None else 1.0 / math.sqrt(shapes[0][-1]),
            causal=bool(bound.get("is_causal", False)),
        )  # fmt: skip
        mask = bound.get("attn_mask")
        if mask is None:
            return self._prepared(match, None)
        if not is_constant(mask, self.known):
            is_mask = mask.meta["val"].dtype == torch.bool
            match = replace(match, operand_rank=len(shapes[0]))
            match = replace(match, mask=mask) if is_mask else replace(match, bias=mask)
            return self._prepared(match, None)
        constant = evaluate(mask, self.known)
        if constant.dtype == torch.bool:
            constant = torch.zeros(constant.shape).masked_fill(~constant, -math.inf)
        full = (*match.lead, *match.lengths)
        return self._prepared(match, constant.float().expand(full).reshape(-1, *full[-2:]))

    def match_softmax(self, node: Node) -> AttentionMatch:
        if node.args[1] not in (-1, len(shape_of(node)) - 1):
            raise NoMatch(Reason.NOT_LAST_AXIS)
        scores = read_scores(node.args[0], self.known)  # type: ignore[arg-type]
        last, value_node, transposed = _walk_forward(node)
        query, key = scores.product.args[:2]
        assert isinstance(query, Node)
        assert isinstance(key, Node)
        lead = scores.shape[:-2]
        if len(lead) < 1 or shape_of(query)[-2] != scores.shape[-2]:
            raise NoMatch(Reason.RANK)
        operands = Operand(query), Operand(key, transposed=True), Operand(value_node, transposed=transposed)
        operands = tuple(self._served(o, lead) for o in operands)  # type: ignore[assignment]
        match = AttentionMatch(
            *operands, last, lead, self._head_count(lead, *reversed(operands)),
            scale=1.0, softcap=scores.softcap, bias=scores.bias, mask=scores.mask, inverted_mask=scores.inverted,
            operand_rank=scores.operand_rank, transposed_result=transposed,
        )  # fmt: skip
        return self._prepared(self._scaled(match, scores.scale), scores.constant)

    def _served(self, operand: Operand, lead: tuple[int, ...]) -> Operand:
        """An operand that has a matrix for each one of the scores, or one head that serves all (Shazeer 2019)."""
        found = shape_of(operand.node)[:-2]
        if math.prod(found) == math.prod(lead):
            return operand
        if len(lead) == 2 and found == (lead[0], 1):
            return replace(operand, heads=1)
        raise NoMatch(Reason.LAYOUT)

    def _head_count(self, lead: tuple[int, ...], *operands: Operand) -> int:
        """Heads: the last axis of `lead`, where that is theirs; else the period of the channels over the matrices."""
        axis = operands[-1].node.meta["val"].shape[:-2][-1]
        if len(lead) > 1:
            return lead[-1] if isinstance(axis, int) else 1
        parts = [read_part(self.layout, o.node, o.transposed) for o in operands]
        counts = [head_count(p) for p in parts if p is not None]
        return next((c for c in counts if c is not None and c > 1), 1)

    def _scaled(self, match: AttentionMatch, scale: Tensor) -> AttentionMatch:
        """One scale for all matrices, or one for each head."""
        if torch.allclose(scale, scale[:1].expand_as(scale), rtol=1e-5):
            return replace(match, scale=match.scale * float(scale[0]))
        per_head = scale[: match.heads]
        if not torch.allclose(scale, per_head.repeat(len(scale) // match.heads), rtol=1e-5):
            raise NoMatch(Reason.NOT_AFFINE)
        return replace(match, head_scale=per_head.clone())

    def _prepared(self, match: AttentionMatch, constant: Tensor | None) -> AttentionMatch:
        """Operands without what the operator does itself; the constant as bias, mask or causality."""
        key_node, key_transposed = upright(match.key.node, match.key.transposed)
        query_node, query_factor = without_scales(match.query.node, self.known)
        key_node, key_factor = without_scales(key_node, self.known)
        key_node, key_transposed = upright(key_node, key_transposed)
        match = replace(
            match, scale=match.scale * query_factor * key_factor,
            query=replace(match.query, node=query_node),
            key=replace(match.key, node=key_node, transposed=key_transposed),
        )  # fmt: skip
        match = self._normalized(match)
        match = replace(
            match,
            query=self._rotated(match.query),
            key=self._rotated(self._grouped(match.key)),
            value=self._grouped(match.value),
        )
        if match.key.heads != match.value.heads:
            raise NoMatch(Reason.LAYOUT)
        if (match.bias or match.mask) is not None and not self._fits(match):
            raise NoMatch(Reason.MASK_SHAPE)
        match = self._with_place(match)
        return match if constant is None else _with_constant(match, constant, self.batch)

    def _fits(self, match: AttentionMatch) -> bool:
        """True when a run-time bias or mask has its axes in the order of ours."""
        operand = match.bias if match.bias is not None else match.mask
        assert operand is not None
        shape = shape_of(operand)
        if len(shape) > match.operand_rank:
            return False
        per_head = shape[-3] if len(shape) >= 3 else 1
        if match.operand_rank == 4:
            return len(match.lead) <= 2 and per_head in (1, match.heads)
        return match.operand_rank == 3 and per_head in (1, math.prod(match.lead))

    def _normalized(self, match: AttentionMatch) -> AttentionMatch:
        """Cosine attention: both operands are unit vectors, which the operator makes itself."""
        key, transposed = upright(match.key.node, match.key.transposed)
        sources = [normalized_source(n, self.known) for n in (match.query.node, key)]
        if match.head_scale is None and None in sources:
            return match
        if None in sources or transposed:
            raise NoMatch(Reason.NOT_AFFINE)
        assert sources[0] is not None
        assert sources[1] is not None
        for node, source in ((match.query.node, sources[0]), (key, sources[1])):
            self.layout.pass_through(node, source)
        head_scale = match.head_scale if match.head_scale is not None else torch.ones(match.heads)
        return replace(match, query=Operand(sources[0]), key=Operand(sources[1]), head_scale=head_scale)

    def _grouped(self, operand: Operand) -> Operand:
        if operand.heads is not None:
            return operand
        found = unrepeated(operand.node, self.layout)
        if found is None:
            return operand
        node, heads, flipped = found
        return Operand(node, operand.transposed != flipped, heads)

    def _rotated(self, operand: Operand) -> Operand:
        rotary = None if operand.transposed else rotary_source(operand.node, self.layout, self.known)
        if rotary is not None:
            self.layout.pass_through(operand.node, rotary.source)
        return replace(operand, rotary=rotary)

    def _with_place(self, match: AttentionMatch) -> AttentionMatch:
        """Self-attention on one tensor, or on three alike, as windows of its tokens."""
        operands = (match.query, match.key, match.value)
        if any(o.rotary is not None or o.heads is not None for o in operands):
            return match
        parts = [read_part(self.layout, o.node, o.transposed) for o in operands]
        if any(p is None for p in parts):
            return match
        natural = place(parts, self.batch, natural=True)  # type: ignore[arg-type]
        local = place(parts, self.batch, natural=False)  # type: ignore[arg-type]
        if local is not None and bool((local.index < 0).any()):  # what padding attends to has no place in the operator
            local = None
        if (match.bias or match.mask) is not None:  # a run-time bias has a row for each window of the batch
            natural, local = (p if p is None or len(p.index) == 1 else None for p in (natural, local))
        if match.softcap or not self.fixed_length:  # the indexed forms know no cap, and an index map has one length
            natural, local = (p if p is None or not p.windowed else None for p in (natural, local))
        natural, local = (p if p is not None and self._worth_packing(p) else None for p in (natural, local))
        return replace(match, place=natural, local_place=local, layout=self.layout)

    def _worth_packing(self, spot: Place) -> bool:
        """Windows always; else where the packed tensor is there, or its projection's rows only need another order."""
        one_linear = len(spot.sources) == 1 and spot.sources[0].target is aten.linear.default
        return (
            spot.windowed or one_linear or (spot.order is None and len(spot.sources) == 1 and not spot.channels_first)
        )

    def finish(self, match: AttentionMatch) -> tuple[AttentionMatch, Kind]:
        """Registers what the result holds, so that what follows is followed in the natural order."""
        spot = match.place
        if spot is not None:
            coordinates = ResultCoordinates(spot.heads, spot.index.shape[1], spot.head_dim, match.transposed_result)
            shifts = torch.arange(self.batch)[:, None, None] * spot.tokens
            flat = torch.where(spot.index < 0, -1, spot.index + shifts).flatten()
            self.layout.register_result(match.result, coordinates, Tokens(flat, spot.tokens * self.batch))
        return match, self._kind(match)

    def _kind(self, match: AttentionMatch) -> Kind:
        """Cross-attention where queries and keys stand for different tokens. A window that holds all tokens is none."""
        query, key = (o.node if o.rotary is None else o.rotary.source for o in (match.query, match.key))
        if not same_stream(query, key, self.known):
            return Kind.CROSS_ATTENTION
        values = read_part(self.layout, match.value.node, match.value.transposed)  # no norm stands before them
        if values is not None and _in_windows(values, self.batch):
            return Kind.WINDOW_ATTENTION
        query_len, key_len = match.lengths
        return Kind.SELF_ATTENTION if query_len == key_len else Kind.CROSS_ATTENTION


def _in_windows(values: Part, batch: int) -> bool:
    """True when the matrices of one sample see different tokens, or the padding around them."""
    return len(torch.unique(values.rows, dim=0)) > batch or bool((values.rows < 0).any())


def _walk_forward(node: Node) -> tuple[Node, Node, bool]:
    """The product that weights the values: (product, values, whether it is values^T weights^T)."""
    weights, current, flipped, mixed = node, only_user(node), False, False
    rank = len(shape_of(node))
    while current is not None and current.target not in PRODUCTS:
        source, exchanged = upright(current, True)
        if current.target in PLAIN:
            pass
        elif source is weights and not exchanged:
            flipped = not flipped
        elif current.target in MIXERS:
            mixed = True
        else:
            raise NoMatch(Reason.NOT_BETWEEN_PRODUCTS)
        weights, current = current, only_user(current)
    if current is None:
        raise NoMatch(Reason.NOT_BETWEEN_PRODUCTS)
    if mixed:
        raise NoMatch(Reason.HEADS_MIXED if rank >= 4 else Reason.NOT_BETWEEN_PRODUCTS)
    first, second = current.args[:2]
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    if first is weights and not flipped:
        return current, second, False
    if second is weights and flipped:
        return current, first, True
    raise NoMatch(Reason.NOT_BETWEEN_PRODUCTS)


def _with_constant(match: AttentionMatch, constant: Tensor, batch: int) -> AttentionMatch:
    """A constant added to the scores, [matrices, query_len, key_len]: nothing, causality, or a finite bias."""
    if not bool(constant.any()):
        return match
    heads = match.place.heads if match.place is not None else match.heads
    per_window = constant.reshape(-1, heads, *constant.shape[-2:])
    if len(per_window) % batch == 0:
        per_window = per_window.reshape(batch, -1, *per_window.shape[1:])
        if not torch.equal(per_window, per_window[:1].expand_as(per_window)):
            raise NoMatch(Reason.LAYOUT)
        per_window = per_window[0]
    per_window = _narrowed(_narrowed(per_window, 0), 1)
    query_len, key_len = per_window.shape[-2:]
    seen = torch.ones(query_len, key_len, dtype=torch.bool).tril()
    if query_len == key_len > 1 and len(per_window) == 1 and bool((per_window[..., ~seen] < MASKED).all()):
        rest = torch.where(seen, per_window, torch.zeros(()))
        if bool((rest > MASKED).all()):
            return replace(match, causal=True, constant_bias=rest if bool(rest.any()) else None)
    if len(per_window) > 1 and match.place is None and (match.bias or match.mask) is not None:
        raise NoMatch(Reason.MASK_SHAPE)
    # A row that is masked whole would be 0 by our definition and NaN or uniform in the original.
    lowest = torch.finfo(torch.float32).min / 4
    return replace(match, constant_bias=per_window.clamp_min(lowest).contiguous())


def _narrowed(value: Tensor, axis: int) -> Tensor:
    """One entry along the axis where all are the same."""
    first = value.narrow(axis, 0, 1)
    return first if torch.equal(value, first.expand_as(value)) else value


__all__ = ["SDPA", "SOFTMAX", "AttentionMatch", "Operand", "find"]
