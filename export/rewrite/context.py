"""A matched context pooling -> ContextPool."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.recognize.context import ContextMatch
from attn_deploy.export.rewrite.editor import Editor
from attn_deploy.export.rewrite.index_space import Groups, arranged, laid_out, replayed, restored

ops = torch.ops.attn_deploy


def rewrite(editor: Editor, match: ContextMatch) -> Node:
    """Replaces the weighted sum and returns the ContextPool node; a softmax that is used elsewhere stays."""
    pool = match.pool
    scores_groups, values_groups, result_groups = _layout(match)
    with editor.at_site(pool.result, origin=pool.softmax):
        weights = pool.weights
        scores = replayed(editor, pool.softmax, pool.moves)
        scores = arranged(editor, scores, weights.axes, scores_groups, pool.batch)
        values = arranged(editor, editor.at(pool.values.node), pool.values.axes, values_groups, pool.batch)
        node = editor.call(ops.context_pool.default, scores, values, match.channels_first)
        editor.replace(pool.result, restored(editor, node, result_groups, pool))
    return node


def original_layout(match: ContextMatch, value: Tensor, like: Tensor) -> Tensor:
    """The original's result laid out as the operator's, for comparison."""
    return laid_out(value, _layout(match)[2], match.pool, like)


def _layout(match: ContextMatch) -> tuple[Groups, Groups, Groups]:
    """Which axes the dimensions of scores, values and result hold."""
    pool = match.pool
    if match.channels_first:  # every group has its own values
        batch, groups = [pool.batch], [a for a in pool.shared if a != pool.batch]
        return (
            (batch, groups, pool.summed),
            (batch, pool.channels, groups, pool.summed),
            (batch, pool.channels, groups),
        )
    shared = pool.shared
    return (
        (shared, pool.groups, pool.summed),
        (shared, pool.summed, pool.channels),
        (shared, pool.groups, pool.channels),
    )
