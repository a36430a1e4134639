"""What recognition gives: a Site that can be rewritten, or Skipped with a reason from a closed list."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch.fx import Node


class Kind(StrEnum):
    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    CHANNEL_GATE = "channel-gate"
    SPATIAL_GATE = "spatial-gate"


class Reason(StrEnum):
    """Why something that looks like attention is not rewritten."""

    DROPOUT = "dropout is active in the captured graph: put the model in evaluation mode"
    GROUPED_HEADS = "grouped heads: key and value have fewer heads than query"
    NOT_BETWEEN_PRODUCTS = "the softmax does not stand between two matrix products"
    NOT_LAST_AXIS = "the softmax is not over the keys: its axis is not the last"
    NOT_AFFINE = "what stands between the scores and the softmax is not scale * scores + bias"
    RUNTIME_OPERANDS = "several run-time values are added to the scores"
    WINDOW_BIAS = "bias or mask differs between windows of one image"
    RANK = "query, key and value are not [batch, heads, tokens, head_dim]"
    GATE_OTHER_INPUTS = "the gate depends on more than a pool of what it multiplies"
    GATE_SHAPE = "the gate does not broadcast over the map as channels or pixels"
    DIFFERS = "the rewritten site gave other numbers than the original, and was undone"


@dataclass(frozen=True)
class AttentionMatch:
    """query, key, value: [batch, heads, tokens, head_dim] (rank 3 means batch and heads merged).

    `bias` or `mask` is a node, or a constant to be added to the graph. `result` is replaced.
    `transposed_key` says that `key` is [..., head_dim, key_len].
    """

    query: Node
    key: Node
    value: Node
    result: Node
    scale: float
    causal: bool = False
    bias: Node | None = None
    mask: Node | None = None
    constant_bias: object | None = None
    """A torch tensor [1, heads, query_len, key_len], finite."""
    inverted_mask: bool = False
    transposed_key: bool = False


@dataclass(frozen=True)
class GateMatch:
    """activation(x * gate + residual); the pools are those of x over height and width.

    `product` is x * gate; `result`, its residual add or activation, is what the operator replaces.
    """

    x: Node
    gate: Node
    residual: Node | None
    activation: str
    product: Node
    result: Node
    mean_pools: tuple[Node, ...] = ()
    max_pools: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Site:
    kind: Kind
    module: str
    source_line: str
    match: AttentionMatch | GateMatch

    @property
    def result(self) -> Node:
        return self.match.result


@dataclass(frozen=True)
class Skipped:
    kind: Kind
    module: str
    source_line: str
    reason: Reason


@dataclass
class Findings:
    sites: list[Site] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
