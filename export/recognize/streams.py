"""Are query and key computed from the same tokens? Decides between self-attention and cross-attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import aten, depends_on_data, is_size, is_tensor

_LAYERS = frozenset({aten.linear.default, aten.layer_norm.default, aten.matmul.default, aten.bmm.default})
"""What stands in a branch of a residual sum, and never in a rotary embedding or a normalization."""


def same_stream(query: Node, key: Node, known: Mapping[str, Tensor]) -> bool:
    """True when the ways back from both, each along its only run-time operand, meet."""
    behind = set(_way_back(query, known))
    return any(node in behind for node in _way_back(key, known))


def _way_back(node: Node, known: Mapping[str, Tensor]) -> list[Node]:
    """The nodes behind `node` up to the first one that joins several run-time values, which is the stream itself."""
    way = [node]
    while True:
        sources = [n for n in node.all_input_nodes if not is_size(n) and depends_on_data(n, known)]
        if len(sources) != 1:
            joined = _one_origin(sources, known) if len(sources) > 1 else None
            if joined is None:
                return way
            sources = [joined]
        node = sources[0]
        way.append(node)


def _one_origin(sources: list[Node], known: Mapping[str, Tensor]) -> Node | None:
    """A rotary embedding or a normalization joins two values that both come from one a few steps behind."""
    frontier = list(sources)
    for _ in range(12):
        distinct = list(dict.fromkeys(frontier))
        if len(distinct) == 1:
            return distinct[0]
        frontier = []
        for node in distinct:
            if node.target in _LAYERS:
                return None
            inner = [n for n in node.all_input_nodes if is_tensor(n) and depends_on_data(n, known)]
            frontier += inner if len(inner) == 1 else [node]
        if frontier == distinct:
            return None
    return None
