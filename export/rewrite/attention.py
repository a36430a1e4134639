"""A matched attention -> our operator, packed where query, key and value are parts of one tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten, evaluate, movement_source, shape_of
from attn_deploy.export.recognize.site import AttentionMatch
from attn_deploy.export.rewrite.editor import Editor

ops = torch.ops.attn_deploy


def rewrite(editor: Editor, match: AttentionMatch) -> Node:
    """Replaces the match's result and returns the operator's node."""
    with editor.at_site(match.result):
        bias, mask = _bias_and_mask(editor, match)
        packed = _packed_source(match)
        if packed is not None:
            source, tokens_first = packed
            joined = editor.at(source)
            if tokens_first:
                joined = editor.call(aten.permute.default, joined, [1, 0, 2])
            batch_size = editor.call(aten.sym_size.int, joined, 0)
            _, tokens, heads, head_dim = _layout(shape_of(match.query))
            qkv = editor.call(aten.reshape.default, joined, [batch_size, tokens, 3, heads, head_dim])
            node = editor.call(ops.packed_attention.default, qkv, bias, mask, match.scale, match.causal)
            unpacked = editor.call(aten.reshape.default, node, [batch_size, tokens, heads, head_dim])
            result = editor.call(aten.permute.default, unpacked, [0, 2, 1, 3])
        else:
            query, key, value = _separate(editor, match)
            node = editor.call(ops.attention.default, query, key, value, bias, mask, match.scale, match.causal)
            result = editor.call(aten.permute.default, node, [0, 2, 1, 3])
            if len(shape_of(match.result)) == 3:
                result = editor.call(aten.squeeze.dim, result, 1)
        editor.replace(match.result, result)
    return node


def original_layout(value: Tensor, like: Tensor) -> Tensor:
    """The original's result [batch, heads, tokens, head_dim] laid out as the operator's, for comparison."""
    if value.dim() == 3:
        value = value.unsqueeze(1)
    return value.transpose(1, 2).reshape(like.shape)


def _layout(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """[batch, heads, tokens, head_dim] -> (batch, tokens, heads, head_dim)."""
    batch, heads, tokens, head_dim = shape
    return batch, tokens, heads, head_dim


def _separate(editor: Editor, match: AttentionMatch) -> list[Node]:
    """query, key, value as [batch, tokens, heads, head_dim]; the permutations cancel with the model's own."""
    nodes = []
    for original in (match.query, match.key, match.value):
        node = editor.at(original)
        if len(shape_of(original)) == 3:
            node = editor.call(aten.unsqueeze.default, node, 1)
        transposed = original is match.key and match.transposed_key
        nodes.append(editor.call(aten.permute.default, node, [0, 3, 1, 2] if transposed else [0, 2, 1, 3]))
    return nodes


def _bias_and_mask(editor: Editor, match: AttentionMatch) -> tuple[Node | None, Node | None]:
    bias = mask = None
    if isinstance(match.constant_bias, Tensor):
        bias = editor.constant(match.constant_bias)
    if match.mask is not None:
        mask = _rank4(editor, editor.at(match.mask))
        if match.inverted_mask:
            mask = editor.call(aten.logical_not.default, mask)
    if match.bias is not None:
        # Our bias is finite and our mask boolean: a float mask may hold -inf, so it is split into both.
        full = _rank4(editor, editor.at(match.bias))
        lowest = torch.finfo(torch.float32).min / 4
        bias = editor.call(aten.clamp_min.default, full, lowest)
        mask = editor.call(aten.gt.Scalar, full, float("-inf"))
    return bias, mask


def _rank4(editor: Editor, node: Node) -> Node:
    while len(node.meta["val"].shape) < 4:
        node = editor.call(aten.unsqueeze.default, node, 0)
    return node


def _packed_source(match: AttentionMatch) -> tuple[Node, bool] | None:
    """The tensor that query, key and value are parts of, [batch, tokens, 3 * heads * head_dim], or the same with
    tokens first (nn.MultiheadAttention), which the flag says; None when there is no such tensor.

    The movement from it is run on numbered elements and must give the packed layout exactly.
    """
    if len(shape_of(match.query)) != 4:
        return None
    sources = {movement_source(part) for part in (match.query, match.key, match.value)}
    if len(sources) != 1:
        return None
    source = sources.pop()
    batch, tokens, heads, head_dim = _layout(shape_of(match.query))
    channels = 3 * heads * head_dim
    for shape, tokens_first in (((batch, tokens, channels), False), ((tokens, batch, channels), True)):
        if shape_of(source) == shape and _is_packed(match, source, tokens_first, heads):
            return source, tokens_first
    return None


def _is_packed(match: AttentionMatch, source: Node, tokens_first: bool, heads: int) -> bool:
    numbered = torch.arange(math.prod(shape_of(source))).reshape(shape_of(source))
    ordered = numbered.transpose(0, 1) if tokens_first else numbered
    expected = ordered.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    for number, part in enumerate((match.query, match.key, match.value)):
        moved = evaluate(part, {source.name: numbered})
        if part is match.key and match.transposed_key:
            moved = moved.transpose(-2, -1)
        if moved.shape != expected[number].shape or not torch.equal(moved, expected[number]):
            return False
    return True
