"""Scaled dot-product attention: a scaled_dot_product_attention node, or a softmax between two matrix products.

What stands between the first product and the softmax is summed up by running it: on zeros it gives the bias, on random
scores it must give scale * scores + bias. So scale on the scores, bias tables and constant masks need no pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    is_tensor,
    module_path,
    movement_source,
    only_user,
    shape_of,
    source_line,
)
from attn_deploy.export.recognize.site import AttentionMatch, Kind, Reason, Site, Skipped

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
PASS_THROUGH = frozenset({aten.reshape.default, aten.expand.default, aten.to.dtype, aten._to_copy.default})
"""Operations that a score or weight matrix may pass on its way to the next product."""

MASKED = -1e4
"""A constant score below this one is a mask: exp of it is 0 in float32."""


class _NoMatch(Exception):
    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every scaled_dot_product_attention and every softmax over tokens of the graph, as a site or a skip."""
    known = constants(captured.program)
    for node in captured.program.graph.nodes:
        if node.target is SDPA:
            matcher = _match_sdpa
        elif node.target in SOFTMAX and len(shape_of(node)) >= 3:
            matcher = _match_softmax
        else:
            continue
        try:
            match = matcher(node, known)
        except _NoMatch as no:
            yield Skipped(Kind.SELF_ATTENTION, module_path(node), source_line(node), no.reason)
            continue
        yield Site(_kind(match), module_path(node), source_line(node), match)


def _kind(match: AttentionMatch) -> Kind:
    """Self-attention when query and key are computed from the same tokens, as far as linear layers show it."""
    sources = []
    for node in (match.query, match.key):
        current = movement_source(node)
        while current.target in (aten.linear.default, aten.mul.Tensor, aten.conv2d.default, aten.addmm.default):
            current = movement_source(current.args[0])
        sources.append(current)
    return Kind.SELF_ATTENTION if sources[0] is sources[1] else Kind.CROSS_ATTENTION


def _match_sdpa(node: Node, known: Mapping[str, Tensor]) -> AttentionMatch:
    bound = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    bound.update(node.kwargs)
    query, key, value = bound["query"], bound["key"], bound["value"]
    if bound.get("dropout_p", 0.0):
        raise _NoMatch(Reason.DROPOUT)
    shapes = [shape_of(t) for t in (query, key, value)]
    if any(len(s) != 4 for s in shapes):
        raise _NoMatch(Reason.RANK)
    if shapes[0][1] != shapes[1][1]:
        raise _NoMatch(Reason.GROUPED_HEADS)
    scale = bound.get("scale")
    match = AttentionMatch(
        query, key, value, node,
        scale=float(scale) if scale is not None else 1.0 / math.sqrt(shapes[0][-1]),
        causal=bool(bound.get("is_causal", False)),
    )  # fmt: skip
    mask = bound.get("attn_mask")
    if mask is None:
        return match
    if mask.meta["val"].dtype == torch.bool:
        if is_constant(mask, known) and bool(evaluate(mask, known).all()):
            return match  # transformers builds a mask even where nothing is masked
        return replace(match, mask=mask)
    if is_constant(mask, known):
        return _with_constant_bias(match, _rank4(evaluate(mask, known)))
    return replace(match, bias=mask)


def _rank4(value: Tensor) -> Tensor:
    return value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))


def _with_constant_bias(match: AttentionMatch, bias: Tensor) -> AttentionMatch:
    """A constant additive mask: nothing, causality, or a finite bias. `bias` is [batch|1, heads|1, query, key]."""
    bias = bias.float()
    if bias.shape[0] > 1:
        if not torch.equal(bias, bias[:1].expand_as(bias)):
            raise _NoMatch(Reason.WINDOW_BIAS)
        bias = bias[:1]
    if not bias.any():
        return match
    query_len, key_len = shape_of(match.query)[-2], bias.shape[-1]
    if bias.shape[-2] == query_len:
        seen = torch.ones(query_len, key_len, dtype=torch.bool).tril()
        if (bias[..., ~seen] < MASKED).all() and (~seen).any():
            rest = torch.where(seen, bias, torch.zeros(()))
            if rest.isfinite().all():
                return replace(match, causal=True, constant_bias=rest if rest.any() else None)
    # A row that is masked whole would be 0 by our definition and NaN or uniform in the original.
    lowest = torch.finfo(torch.float32).min / 4
    return replace(match, constant_bias=bias.clamp_min(lowest).contiguous())


@dataclass(frozen=True)
class _Scores:
    """The way from the product of query and key to the softmax, innermost first."""

    product: Node
    path: tuple[Node, ...]


def _match_softmax(node: Node, known: Mapping[str, Tensor]) -> AttentionMatch:
    if node.args[1] not in (-1, len(shape_of(node)) - 1):
        raise _NoMatch(Reason.NOT_LAST_AXIS)
    scores = _walk_back(node.args[0], known)
    last = _walk_forward(node)
    if scores is None or last is None:
        raise _NoMatch(Reason.NOT_BETWEEN_PRODUCTS)
    product, value = scores.product, last.args[1]
    query, key = product.args
    shapes = [shape_of(t) for t in (query, key, value)]
    if any(len(s) not in (3, 4) for s in shapes) or len({len(s) for s in shapes}) != 1:
        raise _NoMatch(Reason.RANK)
    if shapes[0][:-2] != shapes[1][:-2] or shapes[1][:-2] != shapes[2][:-2]:
        raise _NoMatch(Reason.GROUPED_HEADS)
    if len(shapes[0]) == 3 and scores.path:
        raise _NoMatch(Reason.RANK)
    match = AttentionMatch(query, key, value, last, scale=1.0, transposed_key=True)
    match = _fold_scores(match, scores, node.args[0], known)
    return _fold_operand_scales(match)


def _walk_back(node: Node, known: Mapping[str, Tensor]) -> _Scores | None:
    """From the softmax's input to the product, along operands of its own size that depend on run-time values."""
    path: list[Node] = []
    count = math.prod(shape_of(node))
    current = node
    while current.target not in PRODUCTS:
        sized = [
            n for n in current.all_input_nodes
            if is_tensor(n) and math.prod(shape_of(n)) == count and not is_constant(n, known)
        ]  # fmt: skip
        if current.op != "call_function" or not sized:
            return None
        path.append(current)
        current = sized[0]
    return _Scores(current, tuple(path))


def _walk_forward(node: Node) -> Node | None:
    """The one product that consumes the weights as its first operand."""
    current = only_user(node)
    weights = node
    while current is not None and current.target in PASS_THROUGH:
        weights, current = current, only_user(current)
    if current is None or current.target not in PRODUCTS or current.args[0] is not weights:
        return None
    return current if len(shape_of(weights)) == len(shape_of(node)) else None


def _fold_scores(match: AttentionMatch, scores: _Scores, end: Node, known: Mapping[str, Tensor]) -> AttentionMatch:
    """Scale, bias and mask from what the path does to zeros and to random scores."""
    on_path = {*scores.path, scores.product}
    side = [n for p in scores.path for n in p.all_input_nodes if n not in on_path and is_tensor(n)]
    runtime = list(dict.fromkeys(n for n in side if not is_constant(n, known)))
    if len(runtime) > 1:
        raise _NoMatch(Reason.RUNTIME_OPERANDS)
    values = dict(known)
    for operand in runtime:
        value = operand.meta["val"]
        values[operand.name] = torch.zeros(shape_of(operand), dtype=value.dtype)
    shape = shape_of(scores.product)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(shape, generator=generator)
    try:
        bias = evaluate(end, {**values, scores.product.name: torch.zeros(shape)})
        shifted = evaluate(end, {**values, scores.product.name: probe})
    except (KeyError, RuntimeError, TypeError) as error:
        raise _NoMatch(Reason.NOT_AFFINE) from error
    if bias.shape != probe.shape:
        raise _NoMatch(Reason.RANK)
    seen = bias > MASKED
    gain = (shifted - bias)[seen]
    scale = float((gain * probe[seen]).sum() / (probe[seen] ** 2).sum())
    if not torch.allclose(gain, scale * probe[seen], rtol=1e-4, atol=1e-4 * abs(scale)):
        raise _NoMatch(Reason.NOT_AFFINE)
    match = replace(match, scale=match.scale * scale)
    if len(shape) == 4:
        match = _with_constant_bias(match, bias)
    if runtime:
        match = _with_runtime_operand(match, scores, runtime[0])
    return match


def _with_runtime_operand(match: AttentionMatch, scores: _Scores, operand: Node) -> AttentionMatch:
    """An added float mask, or a boolean one of masked_fill (true where a key is hidden)."""
    user = next(p for p in scores.path if operand in p.all_input_nodes)
    after = scores.path[: scores.path.index(user)]
    scaled_after = any(p.target not in (aten.add.Tensor, *PASS_THROUGH) for p in after)
    if scaled_after or len(shape_of(operand)) > 4:
        raise _NoMatch(Reason.NOT_AFFINE)
    if user.target is aten.add.Tensor and not user.kwargs:
        if match.constant_bias is not None:
            raise _NoMatch(Reason.RUNTIME_OPERANDS)
        return replace(match, bias=operand)
    fill = user.args[2] if user.target is aten.masked_fill.Scalar else 0.0
    if isinstance(fill, (int, float)) and fill < MASKED and operand.meta["val"].dtype == torch.bool:
        return replace(match, mask=operand, inverted_mask=True)
    raise _NoMatch(Reason.NOT_AFFINE)


def _fold_operand_scales(match: AttentionMatch) -> AttentionMatch:
    """A scalar factor on query or key moves into the scale."""
    scale = match.scale
    operands = {"query": match.query, "key": match.key}
    for name, node in operands.items():
        while node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            factor = node.args[1]
            if not isinstance(factor, (int, float)) or not isinstance(node.args[0], Node):
                break
            scale = scale * factor if "mul" in str(node.target) else scale / factor
            node = node.args[0]
        operands[name] = node
    return replace(match, scale=scale, query=operands["query"], key=operands["key"])
