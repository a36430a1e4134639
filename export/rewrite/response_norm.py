"""Global response normalization -> Gate with the gate scale * N + 1: one pass over the map and one for the shift."""

from __future__ import annotations

from torch import Tensor
from torch import ops as torch_namespace
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten
from attn_deploy.export.recognize.response_norm import ResponseNormMatch
from attn_deploy.export.rewrite.editor import Editor
from attn_deploy.export.rewrite.gate import broadcast

ops = torch_namespace.attn_deploy


def rewrite(editor: Editor, match: ResponseNormMatch) -> Node:
    """Replaces the match's result and returns the Gate node."""
    with editor.at_site(match.result, origin=match.product):
        gate = broadcast(editor, editor.at(match.response), match.x)
        if match.scale is not None:
            gate = editor.call(aten.mul.Tensor, gate, editor.at(match.scale))
        if match.identity:
            gate = editor.call(aten.add.Tensor, gate, 1.0)
        node = editor.call(ops.gate.default, editor.at(match.x), gate, None, "")
        result = node if match.shift is None else editor.call(aten.add.Tensor, node, editor.at(match.shift))
        editor.replace(match.result, result)
    return node


def original_layout(match: ResponseNormMatch, value: Tensor, like: Tensor) -> Tensor:
    """The original's result without the shift, which is not the operator's."""
    return value if match.shift_value is None else value - match.shift_value
