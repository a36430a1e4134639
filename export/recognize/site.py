"""What recognition gives: a Site that can be rewritten, or Skipped with a reason from a closed list."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from torch.fx import Node


class Kind(StrEnum):
    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    WINDOW_ATTENTION = "window-attention"
    CHANNEL_ATTENTION = "channel-attention"
    CONTEXT_POOL = "context-pool"
    BRANCH_ATTENTION = "branch-attention"
    HARD_ATTENTION = "hard-attention"
    CHANNEL_GATE = "channel-gate"
    SPATIAL_GATE = "spatial-gate"
    RESIDUAL_GATE = "residual-gate"
    RESPONSE_NORM = "response-norm"
    SOFTMAX = "softmax"
    """A softmax that is no attention: only ever skipped."""


class Reason(StrEnum):
    """Why something that looks like attention is not rewritten."""

    HEADS_MIXED = "the scores or weights of the heads are mixed (talking heads)"
    NOT_BETWEEN_PRODUCTS = "the softmax does not stand between two matrix products"
    NOT_LAST_AXIS = "the softmax is not over the keys: its axis is not the last"
    NOT_AFFINE = "what stands between the scores and the softmax is not scale * scores + bias"
    RUNTIME_OPERANDS = "several run-time values are added to the scores"
    RANK = "query, key and value are not [batch, heads, tokens, head_dim]"
    LAYOUT = "heads and tokens of query, key and value do not line up"
    MASK_SHAPE = "the mask does not broadcast to [batch, heads, query_len, key_len]"
    GATE_OTHER_INPUTS = "the gate depends on more than a pool of what it multiplies"
    GATE_SHAPE = "the gate does not broadcast over the map as channels or pixels"
    CONSTANT_WEIGHTS = "the softmax is over constants: its weights do not depend on the input"
    NOT_SUMMED = "what the softmax weights is not summed over the softmax's own axis"
    CHOSEN_BY_NUMBER = "the token is chosen by whole numbers such as token ids, not by scores"
    LOWEST_CHOSEN = "the tokens with the lowest scores are chosen"
    TOKENS_IN_PARTS = "the choice does not take whole tokens of [batch, tokens, channels]"
    CLASSIFIER = "a softmax over classes or other values that weights nothing"
    FIXED_LENGTH = "the operator would hold for one sequence length only: export with --dynamic batch to have it"
    DIFFERS = "the rewritten site gave other numbers than the original, and was undone"


class Match(Protocol):
    """What a recogniser knows of a site. `result` is the node that the operator's result replaces."""

    @property
    def result(self) -> Node: ...


@dataclass(frozen=True)
class Site:
    """`anchor` is what was looked at: the softmax, the scaled_dot_product_attention or the product."""

    kind: Kind
    module: str
    source_line: str
    match: Match
    anchor: Node

    @property
    def result(self) -> Node:
        return self.match.result


@dataclass(frozen=True)
class Skipped:
    kind: Kind
    module: str
    source_line: str
    reason: Reason
    anchor: Node


@dataclass
class Findings:
    sites: list[Site] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
