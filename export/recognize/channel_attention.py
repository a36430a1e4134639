"""Attention between channels: query, key and value are parts of one projection, and are multiplied over the tokens.

Whatever stands between the projection and the softmax is summed up by running it on random numbers: it must be the
products of the projection's channels over all tokens, scaled to length 1 (XCiT) or not (DaViT), times one number for
each head. So neither the normalization nor the place of the temperature needs a pattern. What does not come from one
projection (as DANet's channel attention) is left to the attention between tokens, of which it is a transposed one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import aten, constants, evaluate, module_path, movement_source, shape_of, source_line
from attn_deploy.export.recognize.site import Kind, Site, Skipped
from attn_deploy.export.recognize.weighted_sum import MATRIX_PRODUCTS, is_softmax, products_of, softmax_axis

SDPA = aten.scaled_dot_product_attention.default

TOLERANCE = 2e-5
"""Of the largest score: float32 rounding over a few thousand tokens stays below; a length of 1e-6 added to a channel's
does not, on the small numbers of the second run."""

MAGNITUDES = (1.0, 1e-3)


@dataclass(frozen=True)
class ChannelAttentionMatch:
    """`source` is [batch, tokens, 3 * heads * head_dim], or channels first [batch, 3 * heads * head_dim, ...tokens].

    `result` is [batch, heads, head_dim, tokens]. `roles` says which of source's three parts are query, key and value;
    `temperature` is one number for each head.
    """

    source: Node
    result: Node
    heads: int
    roles: tuple[int, int, int]
    temperature: tuple[float, ...]
    unscaled: bool
    channels_first: bool


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every softmax attention over channels whose query, key and value are parts of one projection."""
    known = constants(captured.program)
    for node in captured.program.graph.nodes:
        operands = _operands(node, known)
        match = None if operands is None else _match(operands, known)
        if match is not None:
            yield Site(Kind.CHANNEL_ATTENTION, module_path(node), source_line(node), match, node)


@dataclass(frozen=True)
class _Operands:
    """value [batch, heads, head_dim, tokens]; `scores` gives [batch, heads, head_dim, head_dim] from values by name."""

    scores: tuple[Node, ...]
    factor: float
    value: Node
    result: Node

    def evaluate_scores(self, values: Mapping[str, Tensor]) -> Tensor:
        found: list[Tensor] = [evaluate(n, values) for n in self.scores]
        return found[0] if len(found) == 1 else found[0] @ found[1].transpose(-2, -1) * self.factor


def _operands(node: Node, known: Mapping[str, Tensor]) -> _Operands | None:
    """What a softmax or a scaled_dot_product_attention multiplies, when the shapes are those of channel attention."""
    if node.target is SDPA:
        if len(node.args) > 3 or set(node.kwargs) - {"scale"}:  # a mask, dropout or causality
            return None
        query, key, value = node.args
        assert isinstance(query, Node)
        assert isinstance(key, Node)
        scale = node.kwargs.get("scale")
        factor = float(scale) if isinstance(scale, (int, float)) else 1.0 / math.sqrt(shape_of(query)[-1])
        found = _Operands((query, key), factor, value, node)  # type: ignore[arg-type]
        square = shape_of(query)[:-1] == shape_of(key)[:-1] and shape_of(query)[-2] == shape_of(value)[-2]  # type: ignore[arg-type]
    elif is_softmax(node) and softmax_axis(node) == len(shape_of(node)) - 1:
        ends = [(p, moves[-1] if moves else node) for p, moves in products_of(node) if p.target in MATRIX_PRODUCTS]
        if len(ends) != 1 or ends[0][0].args[0] is not ends[0][1]:
            return None
        result = ends[0][0]
        found = _Operands((node.args[0],), 1.0, result.args[1], result)  # type: ignore[arg-type]
        square = shape_of(node)[-1] == shape_of(node)[-2]
    else:
        return None
    return found if square and len(shape_of(found.value)) == len(shape_of(found.result)) == 4 else None


def _match(operands: _Operands, known: Mapping[str, Tensor]) -> ChannelAttentionMatch | None:
    source = movement_source(operands.value)
    shape = shape_of(source) if isinstance(source.meta.get("val"), Tensor) else ()
    if math.prod(shape) != 3 * math.prod(shape_of(operands.value)) or len(shape) < 3:
        return None
    for channels_first in (False, True):
        if not channels_first and len(shape) != 3:
            continue
        place = _value_part(operands, source, channels_first)
        if place is None:
            continue
        for roles in (r for r in itertools.permutations(range(3)) if r[2] == place):
            for unscaled in (False, True):
                temperature = _temperature(operands, known, source, roles, channels_first, unscaled)
                if temperature is not None:
                    heads = shape_of(operands.value)[1]
                    return ChannelAttentionMatch(
                        source, operands.result, heads, roles, temperature, unscaled, channels_first  # type: ignore[arg-type]
                    )  # fmt: skip
    return None


def _parts(packed: Tensor, heads: int, channels_first: bool) -> Tensor:
    """[batch, tokens, channels] or [batch, channels, ...tokens] -> [3, batch, heads, head_dim, tokens]."""
    first = packed.flatten(2) if channels_first else packed.transpose(1, 2)
    return first.unflatten(1, (3, heads, -1)).transpose(0, 1)


def _value_part(operands: _Operands, source: Node, channels_first: bool) -> int | None:
    """Which part of the projection is the value, by numbered elements."""
    shape = shape_of(source)
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    value = evaluate(operands.value, {source.name: numbers})
    heads = value.shape[1]
    if shape[1 if channels_first else 2] % (3 * heads):
        return None
    parts = _parts(numbers, heads, channels_first)
    return next((i for i, part in enumerate(parts) if torch.equal(part, value)), None)


def _temperature(
    operands: _Operands,
    known: Mapping[str, Tensor],
    source: Node,
    roles: tuple[int, ...],
    channels_first: bool,
    unscaled: bool,
) -> tuple[float, ...] | None:
    """The one number for each head that the channels' products are multiplied with; None when they are not."""
    found: list[Tensor] = []
    heads = shape_of(operands.value)[1]
    for seed, magnitude in enumerate(MAGNITUDES):
        random = magnitude * torch.randn(shape_of(source), generator=torch.Generator().manual_seed(seed))
        query, key, _ = (_parts(random.double(), heads, channels_first)[role] for role in roles)
        if not unscaled:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        products = query @ key.transpose(-2, -1)
        try:
            scores = operands.evaluate_scores({**known, source.name: random}).double()
        except (KeyError, RuntimeError, TypeError):  # something else than the projection is in the scores
            return None
        if scores.shape != products.shape:
            return None
        factor = (scores * products).sum((0, 2, 3), keepdim=True) / products.square().sum((0, 2, 3), keepdim=True)
        if (scores - factor * products).abs().max() > TOLERANCE * scores.abs().max():
            return None
        found.append(factor.flatten())
    if not torch.allclose(found[0], found[1], rtol=TOLERANCE):
        return None
    return tuple(found[0].tolist())
