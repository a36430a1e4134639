"""A matched gate -> ChannelPool and Gate."""

from __future__ import annotations

import operator

from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten, shape_of
from attn_deploy.export.recognize.gate import pooled
from attn_deploy.export.recognize.site import GateMatch
from attn_deploy.export.rewrite.editor import Editor

from torch import ops as torch_namespace  # isort: skip

ops = torch_namespace.attn_deploy


def rewrite(editor: Editor, match: GateMatch) -> Node:
    """Replaces pools and product, and returns the Gate node."""
    pools = (*match.mean_pools, *match.max_pools)
    if pools:
        with editor.at_site(pools[0]):
            _rewrite_pools(editor, match)
    with editor.at_site(match.result, origin=match.product):
        residual = None if match.residual is None else editor.at(match.residual)
        node = editor.call(ops.gate.default, editor.at(match.x), editor.at(match.gate), residual, match.activation)
        editor.replace(match.result, node)
    return node


def _rewrite_pools(editor: Editor, match: GateMatch) -> None:
    """Mean and maximum of one map come from one operator."""
    x = editor.at(match.x)
    if match.mean_pools and match.max_pools:
        both = editor.call(ops.channel_pool_mean_max.default, x)
        mean = editor.call(operator.getitem, both, 0)
        maximum = editor.call(operator.getitem, both, 1)
    elif match.mean_pools:
        mean = maximum = editor.call(ops.channel_pool_mean.default, x)
    else:
        mean = maximum = editor.call(ops.channel_pool_max.default, x)
    for pool, value in [(p, mean) for p in match.mean_pools] + [(p, maximum) for p in match.max_pools]:
        if pooled(pool):
            _replace_pool(editor, pool, value)
        else:
            for user in [u for u in pool.users if u.args[1] == 0]:
                _replace_pool(editor, user, value)


def _replace_pool(editor: Editor, original: Node, value: Node) -> None:
    """[batch, channels, 1, 1] in the shape that the original pool gave."""
    if len(shape_of(original)) == 2:
        value = editor.call(aten.squeeze.dims, value, [2, 3])
    editor.replace(original, value)
