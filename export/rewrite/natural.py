"""Values in the natural order of tokens: what stands between the way into windows and the way out, built anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from attn_deploy.export.graph import aten, shape_of
from attn_deploy.export.recognize.layout import MOVES, Layout
from attn_deploy.export.rewrite.editor import Editor


def natural(editor: Editor, layout: Layout, node: Node) -> Node:
    """`node` [..., channels] as [batch, tokens, channels] in the natural order, in the editor's graph."""
    found = editor.natural.get(node)
    if found is None:
        editor.natural[node] = found = _build(editor, layout, node)
    return found


def _build(editor: Editor, layout: Layout, node: Node) -> Node:
    if layout.tokens(node) is None:
        with editor.behind(node):
            return by_sample(editor, node, layout.placed(node).total // editor.batch)
    if node.target in MOVES:
        root = layout.elements(node).root
        if layout.reads_channels_first(node):
            _, channels, *rest = root.meta["val"].shape
            with editor.behind(root):
                flat = editor.reshape(editor.at(root), [editor.batch_size, channels, math.prod(rest)])
                return editor.call(aten.permute.default, flat, [0, 2, 1])
        return natural(editor, layout, root)

    followed = [a for a in layout.followed(node) if isinstance(a, Node)]
    assert followed

    def operand(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        if value in followed:
            return natural(editor, layout, value)
        constant = editor.at(value)
        if node.target is aten.linear.default or node.target is aten.layer_norm.default:
            return constant
        return editor.call(aten.reshape.default, constant, [math.prod(shape_of(value))])

    with editor.at_site(node):
        arguments = [operand(a) for a in node.args]
        return editor.call(node.target, *arguments, **node.kwargs)  # type: ignore[arg-type]


def by_sample(editor: Editor, node: Node, tokens: int) -> Node:
    """`node` [..., channels] as [batch, tokens, channels], in its own order; the example has `tokens` of them."""
    *rows, channels = node.meta["val"].shape
    batch = editor.batch_size
    return editor.reshape(editor.at(node), [batch, None if _varies(rows, batch) else tokens, channels])


def _varies(rows: Sequence[Any], batch: Any) -> bool:
    """True when the number of rows depends on more than the batch."""
    free = {s for size in rows if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
    return not free <= (batch.node.expr.free_symbols if isinstance(batch, torch.SymInt) else set())


def leave(editor: Editor, layout: Layout, exit_node: Node) -> None:
    """Puts the natural order's value in place of a movement that restores it. Several sites may end in one."""
    if exit_node in editor.left:
        return
    editor.left.add(exit_node)
    place = layout.leaves(exit_node)
    value = natural(editor, layout, layout.elements(exit_node).root)
    with editor.at_site(exit_node):
        if place == "first":
            value = editor.call(aten.permute.default, value, [0, 2, 1])
        editor.replace(exit_node, editor.reshape_like(value, exit_node))
