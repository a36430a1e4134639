"""A matched attention over branches -> BranchPool."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten
from attn_deploy.export.recognize.branch import BranchesMatch, BranchMatch
from attn_deploy.export.recognize.weighted_sum import WeightedSum
from attn_deploy.export.rewrite.editor import Editor
from attn_deploy.export.rewrite.index_space import Groups, arranged, laid_out, replayed, restored

ops = torch.ops.attn_deploy


def rewrite(editor: Editor, match: BranchMatch | BranchesMatch) -> Node:
    """Replaces the weighted sum and returns the BranchPool node."""
    if isinstance(match, BranchesMatch):
        return _join(editor, match)
    pool = match.pool
    groups = _layout(pool)
    with editor.at_site(pool.result):
        scores = replayed(editor, pool.softmax, pool.moves)
        scores = arranged(editor, scores, pool.weights.axes, groups, pool.batch)
        x = arranged(editor, editor.at(pool.values.node), pool.values.axes, groups, pool.batch)
        node = editor.call(ops.branch_pool.default, x, scores)
        editor.replace(pool.result, restored(editor, node, _result_layout(pool), pool))
    return node


def original_layout(match: BranchMatch | BranchesMatch, value: Tensor, like: Tensor) -> Tensor:
    """The original's result laid out as the operator's, for comparison."""
    if isinstance(match, BranchesMatch):
        return value
    return laid_out(value, _result_layout(match.pool), match.pool, like)


def _join(editor: Editor, match: BranchesMatch) -> Node:
    """Separate maps become one tensor, their scores another."""
    with editor.at_site(match.result):
        x = editor.call(aten.stack.default, [editor.at(branch.x) for branch in match.branches], 1)
        parts = [replayed(editor, match.softmax, branch.moves) for branch in match.branches]
        node = editor.call(ops.branch_pool.default, x, editor.call(aten.stack.default, parts, 1))
        editor.replace(match.result, node)
    return node


def _layout(pool: WeightedSum) -> Groups:
    """[batch, branches, channels, height, width]"""
    return ((pool.batch,), pool.summed, *((a,) for a in pool.kept if a != pool.batch))


def _result_layout(pool: WeightedSum) -> Groups:
    return ((pool.batch,), *((a,) for a in pool.kept if a != pool.batch))
