"""Context pooling: values summed with weights that a softmax over tokens gives, one score for each token.

GCNet's global context, MobileViTv2's separable self-attention, additive attention pooling. Scores that are a product
of queries and keys are not looked at: they are attention between tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import constants, is_constant, module_path, source_line
from attn_deploy.export.recognize.branch import weights_branches
from attn_deploy.export.recognize.site import Kind, Reason, Site, Skipped
from attn_deploy.export.recognize.weighted_sum import (
    WeightedSum,
    between_tokens,
    is_softmax,
    products_of,
    weighted_sums,
)


@dataclass(frozen=True)
class ContextMatch:
    """`pool` has its groups, channels and tokens in its axes."""

    pool: WeightedSum

    @property
    def result(self) -> Node:
        return self.pool.result

    @property
    def channels_first(self) -> bool:
        """True when every group has its own values, or the values hold channels before tokens: the form that then
        moves nothing."""
        if self.pool.groups:
            return False
        axes = self.pool.values.stored_axes()
        tokens = axes.index(self.pool.summed[0])
        return not self.pool.channels or axes.index(self.pool.channels[0]) < tokens


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every sum over tokens that a softmax of one score for each token weights."""
    known = constants(captured.program)
    for node in captured.program.graph.nodes:
        if not is_softmax(node) or between_tokens(node, known):
            continue
        where = module_path(node), source_line(node)
        if is_constant(node, known):
            yield Skipped(Kind.SOFTMAX, *where, Reason.CONSTANT_WEIGHTS, node)
            continue
        pools = list(weighted_sums(node))
        for pool in pools:
            if not weights_branches(pool):
                yield Site(Kind.CONTEXT_POOL, *where, ContextMatch(pool), node)
        if not pools:
            yield Skipped(*_what_instead(node, *where), node)


def _what_instead(softmax: Node, module: str, line: str) -> tuple[Kind, str, str, Reason]:
    """What the softmax is when it weights no sum."""
    if any(True for _ in products_of(softmax)):
        return Kind.CONTEXT_POOL, module, line, Reason.NOT_SUMMED
    return Kind.SOFTMAX, module, line, Reason.CLASSIFIER
