"""Which ONNX form a torch op with given operands stands for: what is absent decides the name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from attn_deploy.ops import FORMS, Form
from attn_deploy.ops.scores import Scores

Named = tuple[str, list[Any], dict[str, float | int]]
"""The form's name, its inputs in order and its attributes."""


def form_and_operands(operator: str, args: Sequence[Any]) -> tuple[Form, list[Any], dict[str, float | int]]:
    """The form, its inputs in order and its attributes, for the torch op `attn_deploy::operator` called with `args`."""
    name, operands, attributes = _NAMES[operator](*args)
    return FORMS[name], operands, attributes


def _attention(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, head_scale: Any, scale: float, softcap: float, causal: bool
) -> Named:
    grouped = "Grouped" if _shape(query)[2] != _shape(key)[2] else ""
    name = f"Attention{grouped}" + _scores(head_scale, softcap, causal, bias, mask)
    return name, _given(query, key, value, head_scale, bias, mask), _scale(scale, softcap)


def _packed_attention(
    qkv: Any, bias: Any, mask: Any, head_scale: Any, scale: float, softcap: float, causal: bool
) -> Named:
    name = "PackedAttention" + _scores(head_scale, softcap, causal, bias, mask)
    return name, _given(qkv, head_scale, bias, mask), _scale(scale, softcap)


def _packed_attention_indexed(
    qkv: Any, index: Any, fill: Any, head_scale: Any, bias: Any, bias_index: Any, scale: float
) -> Named:
    name = "PackedAttentionIndexed" + ("" if fill is None else "Padded") + _scores(head_scale, 0.0, False, bias, None)
    operands = _given(qkv, index, fill, head_scale, bias, bias_index)
    return name, operands, {"scale": float(scale), "tokens": int(_shape(qkv)[1])}


def _gate(x: Any, gate: Any, residual: Any, activation: str) -> Named:
    return "Gate" + ("" if residual is None else "Residual") + activation, _given(x, gate, residual), {}


def _channel_attention(qkv: Any, temperature: Any, unscaled: bool, channels_first: bool) -> Named:
    suffix = ("Unscaled" if unscaled else "") + ("ChannelsFirst" if channels_first else "")
    return "ChannelAttention" + suffix, [qkv, temperature], {}


def _context_pool(scores: Any, values: Any, channels_first: bool) -> Named:
    return "ContextPool" + ("ChannelsFirst" if channels_first else ""), [scores, values], {}


def _rotary_embedding(x: Any, cos: Any, sin: Any, interleaved: bool) -> Named:
    return "RotaryEmbedding" + ("Interleaved" if interleaved else ""), [x, cos, sin], {}


def _always(name: str) -> Callable[..., Named]:
    """An op with one form, whose operands are the form's inputs."""
    return lambda *operands: (name, list(operands), {})


def _given(*operands: Any) -> list[Any]:
    return [t for t in operands if t is not None]


def _scores(head_scale: Any, softcap: float, causal: bool, bias: Any, mask: Any) -> str:
    cosine = head_scale is not None
    return Scores(bool(causal), bias is not None, mask is not None, bool(softcap), cosine).suffix


def _scale(scale: float, softcap: float) -> dict[str, float | int]:
    return {"scale": float(scale)} | ({"softcap": float(softcap)} if softcap else {})


def _shape(value: Any) -> Sequence[Any]:
    return value.meta["val"].shape if isinstance(value, Node) else value.shape


_NAMES: dict[str, Callable[..., Named]] = {
    "attention": _attention,
    "packed_attention": _packed_attention,
    "packed_attention_indexed": _packed_attention_indexed,
    "gate": _gate,
    "channel_pool_mean": _always("ChannelPoolMean"),
    "channel_pool_max": _always("ChannelPoolMax"),
    "channel_pool_mean_max": _always("ChannelPoolMeanMax"),
    "spatial_pool": lambda x, order: ("SpatialPool" + order, [x], {}),
    "channel_attention": _channel_attention,
    "context_pool": _context_pool,
    "branch_pool": _always("BranchPool"),
    "hard_attention": lambda scores, values, k: ("HardAttention", [scores, values], {"k": int(k)}),
    "rotary_embedding": _rotary_embedding,
}

OPERATORS = tuple(_NAMES)
"""The torch ops, as registered in torch_ops/."""
