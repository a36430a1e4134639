"""Rewrites a graph that ONNX Runtime optimized so that gates, pools and activations stay in its blocked layout.

One rule a file; each takes a Layout and returns how often it fired. Nothing here needs ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_deploy.runtimes.blocked.activations import activate, enter_activations, join_hardswish
from attn_deploy.runtimes.blocked.convolutions import depthwise, pointwise, pool_before
from attn_deploy.runtimes.blocked.elementwise import enter_sums
from attn_deploy.runtimes.blocked.excitation import excite
from attn_deploy.runtimes.blocked.gates import gate
from attn_deploy.runtimes.blocked.graph import NCHWC, OURS, Graph, has_subgraphs
from attn_deploy.runtimes.blocked.layout import Layout
from attn_deploy.runtimes.blocked.pools import enter_pools
from attn_deploy.runtimes.blocked.shapes import infer_shapes

if TYPE_CHECKING:
    import onnx

__all__ = ["RULES", "VERSION", "Rewritten", "rewrite"]

VERSION = "2"
"""Of the rules: what an older version made is made again."""

RULES: tuple[tuple[Callable[[Layout], int], ...], ...] = (
    (join_hardswish,),
    (enter_pools, excite, gate, enter_activations, enter_sums),
    (pool_before, pointwise, depthwise),
    (activate,),
)
"""What was written out; into the layout; into the convolutions; what is left. Each group until nothing changes."""


@dataclass(frozen=True)
class Rewritten:
    """`model` was changed in place; `fired` is how often each rule applied; `reorders` before and after."""

    model: onnx.ModelProto
    fired: dict[str, int]
    reorders: tuple[int, int]


def rewrite(model: onnx.ModelProto, block: int, operators: frozenset[str]) -> Rewritten | str:
    """`operators`: the names that the native library has. Why nothing was done, as text, where no rule applies."""
    from onnx import helper

    graph = Graph(model)
    if has_subgraphs(graph.nodes):
        return "the graph has control flow"
    if not any(node.domain == NCHWC and node.op_type == "Conv" for node in graph.nodes):
        return "ONNX Runtime uses no blocked layout in this graph"
    before = _reorders(graph)
    infer_shapes(graph, block)
    layout = Layout(graph, block, operators)
    fired: dict[str, int] = {}
    for group in RULES:
        while counts := {rule.__name__: count for rule in group if (count := rule(layout))}:
            graph.drop_dead()
            for name, count in counts.items():
                fired[name] = fired.get(name, 0) + count
    if not fired:
        return "the graph has nothing that our operators could do in the blocked layout"
    finished = graph.finish()
    if all(opset.domain != OURS for opset in finished.opset_import):
        finished.opset_import.append(helper.make_opsetid(OURS, 1))
    return Rewritten(finished, fired, (before, _reorders(graph)))


def _reorders(graph: Graph) -> int:
    return sum(node.domain == NCHWC and node.op_type in ("ReorderInput", "ReorderOutput") for node in graph.nodes)
