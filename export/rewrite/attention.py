"""A matched attention -> our operator: packed where query, key and value are parts of one tensor, with an index map
where they stand in windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten, constants, evaluate, is_constant, shape_of
from attn_deploy.export.recognize.attention import AttentionMatch, Operand
from attn_deploy.export.recognize.operands import Spread, Table
from attn_deploy.export.recognize.placement import Place
from attn_deploy.export.rewrite.editor import Editor
from attn_deploy.export.rewrite.natural import by_sample, leave, natural

ops = torch.ops.attn_deploy


def rewrite(editor: Editor, match: AttentionMatch) -> Node:
    """Puts the operator in, and returns its node."""
    return _separate(editor, match) if match.place is None else _packed(editor, match, match.place)


def finish(editor: Editor, match: AttentionMatch) -> None:
    """Replaces what restores the natural order behind a site that stayed in it; all sites are rewritten by now."""
    assert match.layout is not None or not match.exits
    for node in match.exits:
        leave(editor, match.layout, node)  # type: ignore[arg-type]


def original_layout(match: AttentionMatch, value: Tensor, like: Tensor) -> Tensor:
    """The original's result laid out as the operator's, for comparison."""
    if match.transposed_result:
        value = value.transpose(-2, -1)
    place = match.place
    if place is None:
        heads = like.shape[2]
        return value.reshape(-1, heads, *value.shape[-2:]).transpose(1, 2)
    windows = value.reshape(-1, *place.index.shape[:1], place.heads, *value.shape[-2:]).transpose(2, 3).flatten(3)
    if not _is_indexed(match, place):
        return windows.reshape(like.shape)
    index = place.index.flatten()
    rows = windows.flatten(1, 2)[:, index >= 0]
    return like.new_zeros(like.shape).index_copy(1, index[index >= 0], rows)


def _is_indexed(match: AttentionMatch, place: Place) -> bool:
    """False where the windows follow one another in the tokens' order and have one bias: they count as samples then."""
    in_order = torch.equal(place.index.flatten(), torch.arange(place.tokens))
    one_bias = match.constant_bias is None or len(match.constant_bias) == 1
    return not in_order or not one_bias


def _packed(editor: Editor, match: AttentionMatch, place: Place) -> Node:
    layout = [3, place.heads, place.head_dim]
    cosine = match.head_scale is not None  # of the lengths of query and key only the sign of a factor is left
    scale = match.scale * (math.copysign(1.0, place.factor) if cosine else place.factor)
    with editor.at_site(match.result):
        qkv = _qkv(editor, match, place)
        head_scale = _head_scale(editor, match)
        if _is_indexed(match, place):
            qkv = editor.call(aten.reshape.default, qkv, [-1, place.tokens, *layout])
            index = editor.constant(place.index)
            fill = editor.constant(_fill(place).reshape(layout)) if _is_padded(place) else None
            bias, number = _distinct_windows(editor, match, place)
            node = editor.call(ops.packed_attention_indexed.default, qkv, index, fill, head_scale, bias, number, scale)
        else:
            if len(place.index) > 1:
                qkv = editor.call(aten.reshape.default, qkv, [-1, place.index.shape[1], *layout])
            else:
                qkv = editor.reshape(qkv, [*qkv.meta["val"].shape[:2], *layout])
            bias, mask = _bias_and_mask(editor, match, place.heads)
            node = editor.call(
                ops.packed_attention.default, qkv, bias, mask, head_scale, scale, match.softcap, match.causal
            )
        channels = place.heads * place.head_dim
        if place.natural:
            whole = [editor.batch_size, place.tokens, channels]
            editor.natural[match.result] = node if len(place.index) == 1 else editor.reshape(node, whole)
        if not match.exits:
            _put_back(editor, match, node, place)
    return node


def _put_back(editor: Editor, match: AttentionMatch, node: Node, place: Place) -> None:
    """The operator's result in the layout of the original's, where that is used as it is."""
    windows, length = place.index.shape
    flat = place.index.flatten()
    if not torch.equal(flat, torch.arange(place.tokens)):
        node = editor.call(aten.index.Tensor, node, [None, editor.constant(flat.clamp_min(0))])
    if windows == 1:
        lead = node.meta["val"].shape[:2]
        heads_last = editor.reshape(node, [*lead, place.heads, place.head_dim])
    else:
        heads_last = editor.call(aten.reshape.default, node, [-1, length, place.heads, place.head_dim])
    _replace_result(editor, match, heads_last)


def _replace_result(editor: Editor, match: AttentionMatch, value: Node) -> None:
    """`value` is [batch, length, heads, head_dim]."""
    dims = [0, 2, 3, 1] if match.transposed_result else [0, 2, 1, 3]
    moved = editor.call(aten.permute.default, value, dims)
    editor.replace(match.result, editor.reshape(moved, match.result.meta["val"].shape))


def _qkv(editor: Editor, match: AttentionMatch, place: Place) -> Node:
    """[batch, tokens, 3 * heads * head_dim] in packed order: weights are permuted or joined where that does it."""
    if place.order is None and len(place.sources) == 1:
        return _in_order(editor, match, place, place.sources[0])
    joined = _joined_linear(editor, match, place)
    if joined is not None:
        return joined
    parts = [_in_order(editor, match, place, s) for s in place.sources]
    packed = parts[0] if len(parts) == 1 else editor.call(aten.cat.default, parts, -1)
    if place.order is None:
        return packed
    return editor.call(aten.index_select.default, packed, 2, editor.constant(place.order))


def _in_order(editor: Editor, match: AttentionMatch, place: Place, source: Node) -> Node:
    assert match.layout is not None
    if place.channels_first and source in place.sources:
        _, channels, *positions = source.meta["val"].shape
        flat = editor.reshape(editor.at(source), [editor.batch_size, channels, math.prod(positions)])
        return editor.call(aten.permute.default, flat, [0, 2, 1])
    if place.natural:
        return natural(editor, match.layout, source)
    return by_sample(editor, source, place.tokens)


def _joined_linear(editor: Editor, match: AttentionMatch, place: Place) -> Node | None:
    """One projection in place of three of the same tokens, or of one with its rows in another order."""
    known = constants(editor.original)
    inputs, weights, biases = set(), [], []
    for source in place.sources:
        if source.target is not aten.linear.default:
            return None
        x, weight, *rest = source.args
        bias = rest[0] if rest else None
        if not all(is_constant(n, known) for n in (weight, bias) if n is not None):  # type: ignore[arg-type]
            return None
        inputs.add(x)
        weights.append(evaluate(weight, known))  # type: ignore[arg-type]
        biases.append(evaluate(bias, known) if bias is not None else torch.zeros(len(weights[-1])))  # type: ignore[arg-type]
    if len(inputs) != 1:
        return None
    weight, bias = torch.cat(weights), torch.cat(biases)
    if place.order is not None:
        weight, bias = weight[place.order], bias[place.order]
    source = place.sources[0]
    x = inputs.pop()
    assert isinstance(x, Node)
    x = _in_order(editor, match, place, x)
    with editor.at_site(match.result, origin=source):
        return editor.call(aten.linear.default, x, editor.constant(weight), editor.constant(bias))


def _is_padded(place: Place) -> bool:
    """False where every token stands in one window, and nothing else does."""
    return not torch.equal(place.index.flatten().sort().values, torch.arange(place.tokens))


def _fill(place: Place) -> Tensor:
    size = 3 * place.heads * place.head_dim
    fill = torch.zeros(size) if place.fill is None else place.fill
    return fill if place.order is None else fill[place.order]


def _distinct_windows(editor: Editor, match: AttentionMatch, place: Place) -> tuple[Node | None, Node | None]:
    """The bias as its distinct windows [distinct, heads, length, length], and which one each window has."""
    if match.constant_bias is None and not match.causal:
        return None, None
    windows, length = place.index.shape
    bias = torch.zeros(1, 1, length, length) if match.constant_bias is None else match.constant_bias
    if match.causal:
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        bias = bias.masked_fill(hidden, torch.finfo(torch.float32).min / 4)
    bias = bias.expand(windows, place.heads, length, length)
    distinct, number = torch.unique(bias.flatten(1), dim=0, return_inverse=True)
    return editor.constant(distinct.reshape(-1, *bias.shape[1:])), editor.constant(number)


def _head_scale(editor: Editor, match: AttentionMatch) -> Node | None:
    return None if match.head_scale is None else editor.constant(match.head_scale)


def _separate(editor: Editor, match: AttentionMatch) -> Node:
    """Query, key and value read as the model has them; its own permutations cancel with those put here."""
    windows = 1 if match.constant_bias is None else len(match.constant_bias)  # they count as heads
    operands = (match.query, match.key, match.value)
    with editor.at_site(match.result):
        query, key, value = (_heads_last(editor, o, (o.heads or match.heads) * windows) for o in operands)
        bias, mask = _bias_and_mask(editor, match, match.heads)
        head_scale = None if match.head_scale is None else editor.constant(match.head_scale.repeat(windows))
        node = editor.call(
            ops.attention.default, query, key, value, bias, mask, head_scale, match.scale, match.softcap, match.causal
        )
        _replace_result(editor, match, node)
    return node


def _heads_last(editor: Editor, operand: Operand, heads: int) -> Node:
    """[batch, length, heads, head_dim]."""
    original = operand.node if operand.rotary is None else operand.rotary.source
    node = editor.at(original)
    shape = shape_of(original)
    if len(shape) != 4 or shape[1] != heads:
        node = editor.reshape(node, [None, heads, *node.meta["val"].shape[-2:]])
    node = editor.call(aten.permute.default, node, [0, 3, 1, 2] if operand.transposed else [0, 2, 1, 3])
    if operand.rotary is None:
        return node
    cos, sin = (_rotary_table(editor, t) for t in (operand.rotary.cos, operand.rotary.sin))
    return editor.call(ops.rotary_embedding.default, node, cos, sin, operand.rotary.interleaved)


def _rotary_table(editor: Editor, table: Tensor | Table) -> Node:
    """Cosines or sines [1, length, head_dim]."""
    if isinstance(table, Tensor):
        return editor.constant(table[None])
    with editor.behind(table.node):
        node = editor.reshape(editor.at(table.node), [1, None, shape_of(table.node)[-1]])
        if table.spread is Spread.HALVES:
            return editor.call(aten.cat.default, [node, node], -1)
        if table.spread is Spread.PAIRS:
            pairs = editor.call(aten.stack.default, [node, node], -1)
            return editor.reshape(pairs, [1, None, 2 * shape_of(table.node)[-1]])
        return node


def _bias_and_mask(editor: Editor, match: AttentionMatch, heads: int) -> tuple[Node | None, Node | None]:
    bias = mask = None
    if match.constant_bias is not None:
        constant = match.constant_bias
        if len(constant) > 1:  # windows count as heads
            constant = constant.expand(-1, heads, -1, -1).reshape(1, -1, *constant.shape[-2:])
        bias = editor.constant(constant)
    if match.mask is not None:
        mask = _rank4(editor, match, editor.at(match.mask), heads)
        if match.inverted_mask:
            mask = editor.call(aten.logical_not.default, mask)
    if match.bias is not None:
        # Our bias is finite and our mask boolean: a float mask may hold -inf, so it is split into both.
        full = _rank4(editor, match, editor.at(match.bias), heads)
        lowest = torch.finfo(torch.float32).min / 4
        runtime = editor.call(aten.clamp_min.default, full, lowest)
        bias = runtime if bias is None else editor.call(aten.add.Tensor, runtime, bias)
        mask = editor.call(aten.gt.Scalar, full, float("-inf"))
    return bias, mask


def _rank4(editor: Editor, match: AttentionMatch, node: Node, heads: int) -> Node:
    """A run-time bias or mask as [batch|1, heads|1, query_len|1, key_len]."""
    rank = match.operand_rank
    while len(node.meta["val"].shape) < rank:
        node = editor.call(aten.unsqueeze.default, node, 0)
    if rank == 4:
        return node
    shape: Sequence[int] = node.meta["val"].shape
    if shape[0] == 1 or heads == 1:
        return editor.call(aten.unsqueeze.default, node, 1)
    return editor.reshape(node, [None, heads, *shape[1:]])


__all__ = ["finish", "original_layout", "rewrite"]
