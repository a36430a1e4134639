"""Models of the table that no package offers under a name: sources as `attention_coverage.factories:NAME`."""

from __future__ import annotations

import timm
import torch
import transformers
from torch import nn

Made = tuple[nn.Module, dict[str, torch.Tensor]]


def resnet50_cbam(img_size: int = 224, layers: tuple[int, ...] = (3, 4, 6, 3)) -> Made:
    """ResNet-50 with a CBAM layer at the end of every block (Woo et al. 2018, figure 3)."""
    model = timm.create_model("resnet50", block_args={"attn_layer": "cbam"}, layers=tuple(layers))
    return model, {"x": torch.zeros(1, 3, img_size, img_size)}


def whisper_encoder(
    d_model: int = 384, encoder_layers: int = 4, encoder_attention_heads: int = 6, max_source_positions: int = 1500
) -> Made:
    """The encoder of Whisper (tiny by default) on log-mel features [batch, mel_bins, frames]."""
    config = transformers.WhisperConfig(
        d_model=d_model, encoder_layers=encoder_layers, encoder_attention_heads=encoder_attention_heads,
        encoder_ffn_dim=4 * d_model, max_source_positions=max_source_positions,
    )  # fmt: skip
    encoder = transformers.WhisperModel(config).get_encoder()
    return encoder, {"input_features": torch.zeros(1, config.num_mel_bins, 2 * max_source_positions)}
