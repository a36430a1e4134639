"""A matched attention between channels -> ChannelAttention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten, shape_of
from attn_deploy.export.recognize.channel_attention import ChannelAttentionMatch
from attn_deploy.export.rewrite.editor import Editor

ops = torch.ops.attn_deploy


def rewrite(editor: Editor, match: ChannelAttentionMatch) -> Node:
    """Replaces the match's result [batch, heads, head_dim, tokens] and returns the operator's node."""
    _, heads, head_dim, tokens = shape_of(match.result)
    temperature = editor.constant(torch.tensor(match.temperature))
    parts_axis = 1 if match.channels_first else 2
    roles = None if match.roles == (0, 1, 2) else editor.constant(torch.tensor(match.roles))
    with editor.at_site(match.result):
        source = editor.at(match.source)
        batch = editor.call(aten.sym_size.int, source, 0)
        shape = [3, heads, head_dim, tokens] if match.channels_first else [tokens, 3, heads, head_dim]
        qkv = editor.call(aten.reshape.default, source, [batch, *shape])
        if roles is not None:
            qkv = editor.call(aten.index_select.default, qkv, parts_axis, roles)
        node = editor.call(ops.channel_attention.default, qkv, temperature, match.unscaled, match.channels_first)
        if match.channels_first:
            result = editor.call(aten.reshape.default, node, [batch, heads, head_dim, tokens])
        else:
            unmerged = editor.call(aten.reshape.default, node, [batch, tokens, heads, head_dim])
            result = editor.call(aten.permute.default, unmerged, [0, 2, 3, 1])
        editor.replace(match.result, result)
    return node


def original_layout(match: ChannelAttentionMatch, value: Tensor, like: Tensor) -> Tensor:
    """The original's result [batch, heads, head_dim, tokens] laid out as the operator's, for comparison."""
    return (value if match.channels_first else value.permute(0, 3, 1, 2)).reshape(like.shape)
