"""Watching a forward pass in PyTorch: its layers, additions, gates and the scores of its attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MASKED_BELOW = -60.0
"""Scores at or below this are masked keys (Swin adds -100, others the lowest float or -inf)."""

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
PROJECTIONS = {F.linear, *CONVOLUTIONS}
NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, torch.rms_norm}
LAYERS = {*PROJECTIONS, *NORMS, F.embedding, torch.addmm}

_SOFTMAXES = {F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax}
_GATES = {torch.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


class ForwardTap(TorchFunctionMode):
    """Sees every layer, addition, gate and attention softmax of a forward pass, and may change what it sees.

    `scaled_dot_product_attention` and `nn.MultiheadAttention` run step by step, so that their scores are seen as well.
    """

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        """Replaces what the softmax over axis `dim`, the keys, is taken of."""
        return scores

    def gate(self, output: Tensor) -> Tensor:
        """Replaces the result of a sigmoid or hard sigmoid."""
        return output

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Runs a projection, norm or embedding."""
        return func(*args, **kwargs)

    def addition(self, left: Any, right: Any) -> None:
        """Sees the operands of a sum before it is taken."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            # Its first line hands over to any active mode; without that line it runs as written, inside this mode.
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with self:
                return _attend(*args, **kwargs)
        if func in _SOFTMAXES:
            x, *rest = args or (kwargs.pop("input"),)
            dim = kwargs["dim"] if "dim" in kwargs else rest[0]
            # Below three axes it is a classifier's softmax over classes; a single key leaves nothing to attend to.
            seen = dim is not None and x.dim() >= 3 and x.shape[dim] > 1
            return func(self.scores(x, dim) if seen else x, *rest, **kwargs)
        if func in LAYERS:
            return self.layer(func, args, kwargs)
        if func in _ADDITIONS:
            self.addition(*args[:2])
        output = func(*args, **kwargs)
        return self.gate(output) if func in _GATES else output


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in steps, on [..., heads, tokens, head_dim], without dropout."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    # A fully masked row gives 0, as the fused operator does.
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value
