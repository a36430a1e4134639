"""Attentions as torch modules, to build models from: they train as any module does and export to operators of ours.

PyTorch code, which `load` and what it imports never touch: `import attn_deploy` does not import it.
"""

from __future__ import annotations

from attn_deploy.nn.cbam import CBAM, ChannelAttention, SpatialAttention
from attn_deploy.nn.coordinate import CoordinateAttention
from attn_deploy.nn.efficient_channel import EfficientChannelAttention
from attn_deploy.nn.hard_attention import HardAttention
from attn_deploy.nn.multi_head import MultiHeadAttention
from attn_deploy.nn.non_local import NonLocalBlock
from attn_deploy.nn.positional import (
    LearnedPositionalEncoding,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
)
from attn_deploy.nn.residual_attention import ResidualAttentionBlock
from attn_deploy.nn.scaled_dot_product import ScaledDotProductAttention
from attn_deploy.nn.soft_attention import SoftAttention
from attn_deploy.nn.squeeze_excitation import SqueezeExcitation
from attn_deploy.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "CBAM",
    "ChannelAttention",
    "CoordinateAttention",
    "EfficientChannelAttention",
    "HardAttention",
    "LearnedPositionalEncoding",
    "MultiHeadAttention",
    "NonLocalBlock",
    "ResidualAttentionBlock",
    "RotaryPositionalEncoding",
    "ScaledDotProductAttention",
    "SinusoidalPositionalEncoding",
    "SoftAttention",
    "SpatialAttention",
    "SqueezeExcitation",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
