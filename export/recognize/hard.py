"""Hard attention: the tokens with the highest scores are taken, and nothing of the others.

A top-k, an arg-max or a maximum with its place, whose numbers then take tokens: by gather, by an index, or as a one-hot
matrix in a product. That whole tokens are taken, in the order of their scores, is seen by running it on chosen numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    shape_of,
    source_line,
)
from attn_deploy.export.recognize.site import Kind, Reason, Site, Skipped
from attn_deploy.export.recognize.weighted_sum import MATRIX_PRODUCTS

TAKING = frozenset({aten.gather.default, aten.index.Tensor}) | MATRIX_PRODUCTS

MAX_STEPS = 8
"""Nodes between the choice and what takes the tokens: an unsqueeze, an expand, a one-hot matrix made of a few."""


@dataclass(frozen=True)
class HardMatch:
    """scores [batch, tokens], which may have dimensions of 1 besides; values [batch, tokens, channels], or channels
    first. `result` holds k tokens in either layout; its dimension of k may be missing when it is 1."""

    scores: Node
    values: Node
    k: int
    channels_first: bool
    result: Node


@dataclass(frozen=True)
class _Choice:
    """`numbers` are the tokens' numbers, made from `scores` along `axis`."""

    scores: Node
    numbers: Node
    axis: int
    k: int
    highest: bool = True


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every choice of the k highest scores that takes tokens; one that takes nothing is no attention at all."""
    known = constants(captured.program)
    for node in captured.program.graph.nodes:
        choice = _choice(node)
        if choice is None or is_constant(choice.scores, known):
            continue
        for taken in _takers(choice.numbers, known):
            found = _match(choice, taken, known)
            if isinstance(found, Reason):
                yield Skipped(Kind.HARD_ATTENTION, module_path(node), source_line(node), found, node)
            else:
                yield Site(Kind.HARD_ATTENTION, module_path(node), source_line(node), found, node)


def _choice(node: Node) -> _Choice | None:
    """What the node chooses; None when it chooses nothing, or the numbers of what it chose are not used."""
    if node.target is aten.argmax.default and len(node.args) > 1 and isinstance(node.args[1], int):
        return _Choice(_first(node), node, node.args[1], 1)
    if node.target is aten.max.dim:
        numbers = _second_output(node)
        return None if numbers is None else _Choice(_first(node), numbers, int(node.args[1]), 1)  # type: ignore[call-overload]
    if node.target is aten.topk.default and isinstance(node.args[1], int):
        numbers = _second_output(node)
        axis, highest = (*node.args[2:4], *(-1, True)[len(node.args) - 2 :])[:2]
        if numbers is not None and isinstance(axis, int):
            return _Choice(_first(node), numbers, axis, node.args[1], bool(highest))
    return None


def _first(node: Node) -> Node:
    scores = node.args[0]
    assert isinstance(scores, Node)
    return scores


def _second_output(node: Node) -> Node | None:
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == 1), None)


def _takers(numbers: Node, known: Mapping[str, Tensor]) -> Iterator[tuple[Node, Node]]:
    """Every node that takes elements of a run-time tensor by the numbers, and that tensor."""
    pending, seen = [(numbers, 0)], {numbers}
    while pending:
        node, steps = pending.pop(0)
        for user in node.users:
            if user in seen or steps == MAX_STEPS:
                continue
            others = [n for n in user.all_input_nodes if n not in seen and is_tensor(n) and not is_constant(n, known)]
            if not others:
                seen.add(user)
                pending.append((user, steps + 1))
            elif len(others) == 1 and user.target is aten.mul.Tensor:
                yield from ((end, others[0]) for end in user.users if end.target is aten.sum.dim_IntList)
            elif len(others) == 1 and user.target in TAKING:
                yield user, others[0]


def _match(choice: _Choice, taken: tuple[Node, Node], known: Mapping[str, Tensor]) -> HardMatch | Reason:
    result, values = taken
    scores = shape_of(choice.scores)
    axis = choice.axis % len(scores)
    if not choice.scores.meta["val"].is_floating_point():
        return Reason.CHOSEN_BY_NUMBER
    if not choice.highest:
        return Reason.LOWEST_CHOSEN
    tokens = scores[axis]
    if axis == 0 or math.prod(scores) != scores[0] * tokens or len(shape_of(values)) != 3:
        return Reason.TOKENS_IN_PARTS
    for channels_first in (False, True):
        if shape_of(values)[2 if channels_first else 1] != tokens or shape_of(values)[0] != scores[0]:
            continue
        match = HardMatch(choice.scores, values, choice.k, channels_first, result)
        if _takes_tokens(match, choice, known):
            return match
    return Reason.TOKENS_IN_PARTS


def _takes_tokens(match: HardMatch, choice: _Choice, known: Mapping[str, Tensor]) -> bool:
    """Runs what lies between the choice and the result on numbers of our own, and on values that tell where from."""
    shape = shape_of(match.values)
    values = torch.arange(math.prod(shape)).reshape(shape).to(match.values.meta["val"].dtype)
    batch, tokens = shape[0], shape[2 if match.channels_first else 1]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(tokens, generator=generator)[: match.k] for _ in range(batch)])
    given = {choice.numbers.name: chosen.reshape(shape_of(choice.numbers)), match.values.name: values}
    try:
        got: Tensor = evaluate(match.result, {**known, **given})
    except (KeyError, RuntimeError, IndexError, TypeError):
        return False
    whole = values.transpose(1, 2) if match.channels_first else values
    expected = whole.gather(1, chosen.unsqueeze(-1).expand(-1, -1, whole.shape[2]))
    expected = expected.transpose(1, 2) if match.channels_first else expected
    dense = [d for d in got.shape if d != 1] == [d for d in expected.shape if d != 1]
    return dense and torch.equal(got.flatten(), expected.flatten())
