"""A matched choice of tokens -> HardAttention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten, shape_of
from attn_deploy.export.recognize.hard import HardMatch
from attn_deploy.export.rewrite.editor import Editor

ops = torch.ops.attn_deploy


def rewrite(editor: Editor, match: HardMatch) -> Node:
    """Replaces the taken tokens and returns the operator's node; numbers and scores that are used elsewhere stay."""
    tokens = shape_of(match.values)[2 if match.channels_first else 1]
    with editor.at_site(match.result):
        scores, values = editor.at(match.scores), editor.at(match.values)
        batch = editor.call(aten.sym_size.int, values, 0)
        if len(shape_of(match.scores)) > 2:
            scores = editor.call(aten.reshape.default, scores, [batch, tokens])
        if match.channels_first:
            values = editor.call(aten.permute.default, values, [0, 2, 1])
        node = editor.call(ops.hard_attention.default, scores, values, match.k)
        result = editor.call(aten.permute.default, node, [0, 2, 1]) if match.channels_first else node
        if len(shape_of(match.result)) != 3:
            result = editor.call(aten.reshape.default, result, [batch, *shape_of(match.result)[1:]])
        editor.replace(match.result, result)
    return node


def original_layout(match: HardMatch, value: Tensor, like: Tensor) -> Tensor:
    """The original's result laid out as the operator's, for comparison."""
    if not match.channels_first:
        return value.reshape(like.shape)
    return value.reshape(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2)
