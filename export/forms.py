"""Which ONNX form a torch op with given operands stands for: what is absent decides the name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from attn_deploy.ops import FORMS, Form


def form_and_operands(operator: str, args: Sequence[Any]) -> tuple[Form, list[Any], dict[str, float | int]]:
    """The form, its inputs in order and its attributes, for the torch op `attn_deploy::operator` called with `args`."""
    if operator == "attention":
        query, key, value, bias, mask, scale, causal = args
        name = "Attention" + _scores_suffix(causal, bias, mask)
        return FORMS[name], [t for t in (query, key, value, bias, mask) if t is not None], {"scale": float(scale)}
    if operator == "packed_attention":
        qkv, bias, mask, scale, causal = args
        name = "PackedAttention" + _scores_suffix(causal, bias, mask)
        return FORMS[name], [t for t in (qkv, bias, mask) if t is not None], {"scale": float(scale)}
    if operator == "packed_attention_indexed":
        qkv, index, fill, bias, bias_index, scale = args
        name = "PackedAttentionIndexed" + ("" if bias is None else "Bias")
        operands = [t for t in (qkv, index, fill, bias, bias_index) if t is not None]
        return FORMS[name], operands, {"scale": float(scale), "tokens": int(_shape(qkv)[1])}
    if operator == "gate":
        x, gate, residual, activation = args
        name = "Gate" + ("" if residual is None else "Residual") + activation
        return FORMS[name], [t for t in (x, gate, residual) if t is not None], {}
    pools = {
        "channel_pool_mean": "ChannelPoolMean",
        "channel_pool_max": "ChannelPoolMax",
        "channel_pool_mean_max": "ChannelPoolMeanMax",
    }
    return FORMS[pools[operator]], list(args), {}


def _scores_suffix(causal: bool, bias: Any, mask: Any) -> str:
    return ("Causal" if causal else "") + ("" if bias is None else "Bias") + ("" if mask is None else "Mask")


def _shape(value: Any) -> Sequence[Any]:
    return value.meta["val"].shape if isinstance(value, Node) else value.shape


OPERATORS = (
    "attention",
    "packed_attention",
    "packed_attention_indexed",
    "channel_pool_mean",
    "channel_pool_max",
    "channel_pool_mean_max",
    "gate",
)
"""The torch ops, as registered in torch_ops.py."""
