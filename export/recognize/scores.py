"""From the product of query and key to the softmax: scale, bias, mask, causality and cap, found by running the way.

On zeros it gives the bias; on random and on large scores it must give scale * scores + bias, or
cap * tanh(scale * scores / cap) + bias. So scale on the scores, bias tables and constant masks need no pattern. A value
that depends on the model's inputs stays an operand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import aten, depends_on_data, evaluate, is_constant, is_tensor, shape_of, varies
from attn_deploy.export.recognize.site import Reason

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
MIXERS = frozenset(
    {aten.linear.default, aten.conv2d.default, aten.conv1d.default, aten.permute.default, aten.transpose.int}
)
PLAIN = frozenset(
    {
        aten.reshape.default,
        aten.expand.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
"""Operations that scores or weights may pass without a change."""
ADDITIONS = frozenset({aten.add.Tensor})
WHERE = frozenset({aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther})

MASKED = -1e4
"""A constant score below this one is a mask: exp of it is 0 in float32."""


class NoMatch(Exception):
    """Raised where something looks like attention and is none that we rewrite."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


@dataclass(frozen=True)
class Scores:
    """softmax is taken of cap(scale * product) + bias, where the mask allows.

    `scale` has one number for each matrix of the product, [matrices]. `constant` is the bias [matrices, query_len,
    key_len], with entries below MASKED where a constant mask hides a key; None when all are zero. `bias` or `mask` is
    a run-time operand as the graph adds or fills it, which broadcasts to scores of `operand_rank` axes; `inverted` says
    that the mask is true where a key is hidden.
    """

    product: Node
    shape: tuple[int, ...]
    scale: Tensor
    softcap: float
    constant: Tensor | None
    bias: Node | None
    mask: Node | None
    inverted: bool
    operand_rank: int


def read_scores(end: Node, known: Mapping[str, Tensor]) -> Scores:
    """What stands between a product of two run-time values and `end`, the softmax's input. Raises NoMatch."""
    product, path = _walk_back(end, known)
    if any(p.target in MIXERS for p in path):
        raise NoMatch(Reason.HEADS_MIXED)
    on_path = {*path, product}
    side = [n for p in path for n in p.all_input_nodes if n not in on_path and is_tensor(n)]
    by_length = any(varies(n) for p in path if p.target not in PLAIN for n in p.all_input_nodes)
    if by_length:
        raise NoMatch(Reason.NOT_AFFINE)
    runtime = list(dict.fromkeys(n for n in side if not is_constant(n, known)))
    bias_node, mask_node, inverted, axes = _operands(path, runtime, known)
    values = dict(known)
    for operand in runtime:  # one that hides nothing and adds nothing
        neutral = operand is mask_node and not inverted
        values[operand.name] = torch.full(shape_of(operand), neutral, dtype=operand.meta["val"].dtype)
    shape = shape_of(product)
    try:
        bias = _probe(end, product, values, torch.zeros(shape))
        scale, cap = _scale(end, product, values, bias, path)
    except (KeyError, RuntimeError, TypeError) as error:
        raise NoMatch(Reason.NOT_AFFINE) from error
    constant = bias if bool(bias.any()) else None
    return Scores(product, shape_of(end), scale, cap, constant, bias_node, mask_node, inverted, axes)


def _walk_back(node: Node, known: Mapping[str, Tensor]) -> tuple[Node, list[Node]]:
    """The product and the way from it to `node`, innermost last, along operands as large as the scores."""
    path: list[Node] = []
    count = math.prod(shape_of(node))
    current = node
    while current.target not in PRODUCTS:
        sized = [
            n for n in current.all_input_nodes
            if is_tensor(n) and math.prod(shape_of(n)) == count and depends_on_data(n, known)
        ]  # fmt: skip
        if current.op != "call_function" or not sized:
            raise NoMatch(Reason.NOT_BETWEEN_PRODUCTS)
        if len(sized) > 1:  # a full-size bias made at run time: the scores are what a product of two operands gives
            sized.sort(key=lambda n: _reaches_product(n, count))
        path.append(current)
        current = sized[0]
    return current, path


def _reaches_product(node: Node, count: int) -> int:
    """Order of preference: 0 where only scalings and reshapes stand before a product of two head vectors' matrices."""
    steps = 0
    while node.target not in PRODUCTS and node.all_input_nodes and steps < 16:
        sized = [n for n in node.all_input_nodes if is_tensor(n) and math.prod(shape_of(n)) == count]
        if not sized:
            return 99
        node, steps = sized[0], steps + 1
    return steps if node.target in PRODUCTS else 99


def _probe(end: Node, product: Node, values: Mapping[str, Tensor], scores: Tensor) -> Tensor:
    """The softmax's input [matrices, query_len, key_len] for given scores."""
    found = evaluate(end, {**values, product.name: scores})
    return found.float().reshape(-1, *scores.shape[-2:])


def _scale(
    end: Node, product: Node, values: Mapping[str, Tensor], bias: Tensor, path: list[Node]
) -> tuple[Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    shape = shape_of(product)
    scores = torch.randn(shape, generator=generator)
    shifted = _probe(end, product, values, scores)
    scores = scores.reshape(shifted.shape)
    seen = bias > MASKED
    gain = torch.where(seen, shifted - bias, torch.zeros(()))
    scores = torch.where(seen, scores, torch.zeros(()))
    cap = 0.0
    if any(p.target is aten.tanh.default for p in path):
        high = _probe(end, product, values, torch.full(shape, 1e6))
        cap = float((high - bias)[seen].median()) if bool(seen.any()) else 0.0
        gain = cap * torch.atanh((gain / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    scale = (gain * scores).sum((1, 2)) / (scores**2).sum((1, 2)).clamp_min(1e-9)
    hidden = ~seen.flatten(1).any(1)  # a matrix without a seen key says nothing: it takes its neighbours' scale
    if bool(hidden.any()) and not bool(hidden.all()):
        scale = torch.where(hidden, scale[~hidden].mean(), scale)
    expected = scale[:, None, None] * scores
    limit = 1e-4 if not cap else 2e-3
    if not torch.allclose(gain, expected, rtol=limit, atol=limit * float(scale.abs().max())):
        raise NoMatch(Reason.NOT_AFFINE)
    if not cap and not _stays_affine(end, product, values, bias, scale):
        raise NoMatch(Reason.NOT_AFFINE)
    if not bool((scale.abs() > 0).any()):
        raise NoMatch(Reason.NOT_AFFINE)
    return scale, cap


LARGE = 1e3
"""Scores beyond any that a model gives. One that cuts them off farther away only guards against overflow."""


def _stays_affine(end: Node, product: Node, values: Mapping[str, Tensor], bias: Tensor, scale: Tensor) -> bool:
    """False where large scores are cut off, which small ones do not show."""
    seen = bias > MASKED
    for sign in (1.0, -1.0):
        found = _probe(end, product, values, torch.full(shape_of(product), sign * LARGE)) - bias
        expected = (sign * LARGE * scale)[:, None, None].expand_as(found)
        if not torch.allclose(found[seen], expected[seen], rtol=1e-3):
            return False
    return True


def _operands(
    path: list[Node], runtime: list[Node], known: Mapping[str, Tensor]
) -> tuple[Node | None, Node | None, bool, int]:
    """(bias, mask, whether the mask is true where a key is hidden, axes of the scores where it comes in)."""
    if len(runtime) > 1:
        raise NoMatch(Reason.RUNTIME_OPERANDS)
    if not runtime:
        return None, None, False, 0
    operand = runtime[0]
    number = next(i for i, p in enumerate(path) if operand in p.all_input_nodes)
    user, end = path[number], path[0]
    if any(p.target not in ADDITIONS | PLAIN for p in path[:number]):
        raise NoMatch(Reason.NOT_AFFINE)
    rank = len(shape_of(user))
    if rank > 4 or shape_of(user)[-2:] != shape_of(end)[-2:] or (rank != 4 and rank != len(shape_of(end))):
        raise NoMatch(Reason.MASK_SHAPE)
    if user.target in ADDITIONS and not user.kwargs:
        return operand, None, False, rank
    hides = _hides(user, operand, known)
    if hides is None or operand.meta["val"].dtype != torch.bool:
        raise NoMatch(Reason.NOT_AFFINE)
    return None, operand, hides, rank


def _hides(user: Node, operand: Node, known: Mapping[str, Tensor]) -> bool | None:
    """The value of a mask at which masked_fill or where puts a number below MASKED; None where it does otherwise."""
    if user.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and user.args[1] is operand:
        return True if _is_lowest(user.args[2], known) else None
    if user.target in WHERE and user.args[0] is operand:
        for side, hides in ((2, False), (1, True)):
            if _is_lowest(user.args[side], known):
                return hides
    return None


def _is_lowest(fill: Any, known: Mapping[str, Tensor]) -> bool:
    """True for a number below MASKED, or a constant of such numbers."""
    if isinstance(fill, Node):
        return is_tensor(fill) and is_constant(fill, known) and bool((evaluate(fill, known) < MASKED).all())
    return isinstance(fill, (int, float)) and fill < MASKED
