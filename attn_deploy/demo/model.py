"""DemoNet: a small CNN for 8x8 digits with SE and CBAM gates, self-attention and hard attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.demo import LABELS, WEIGHTS
from attn_deploy.demo.blocks import ChannelGate, HardAttention, SelfAttention, SpatialGate, SqueezeExcitationGate


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SqueezeExcitationBlock(nn.Module):
    """relu(x + gate(f(x)) * f(x)) on [batch, channels, height, width]: the residual block of SE-ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels, 3), nn.ReLU(), _conv(channels, channels, 3))
        self.gate = SqueezeExcitationGate(channels, channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return F.relu(y * self.gate(y) + x)


class CbamBlock(nn.Module):
    """relu(z * spatial(z) + shortcut(x)) with z = f(x) * channel(f(x)): the first block of a CBAM-ResNet stage.

    [batch, inputs, height, width] -> [batch, outputs, height / 2, width / 2].
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, 3, stride=2), nn.ReLU(), _conv(outputs, outputs, 3))
        self.channel_gate = ChannelGate(outputs, outputs // 4)
        self.spatial_gate = SpatialGate()
        self.shortcut = _conv(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = y * self.channel_gate(y)
        y = y * self.spatial_gate(y)
        return F.relu(y + self.shortcut(x))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, each with its residual: [batch, tokens, dim] -> the same."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def sinusoidal_positions(height: int, width: int, dim: int) -> Tensor:
    """[1, height * width, dim]: half of `dim` encodes the row, half the column, each as sines then cosines.

    Vaswani et al. 2017, section 3.5, once per axis. Wavelengths run from 2*pi to 2*pi*100 pixels, since the map is far
    smaller than the sentences that the paper's 10000 is meant for.
    """
    quarter = dim // 4
    frequency = 100.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, column)]  # each [height * width, quarter]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).unsqueeze(0)


class DemoNet(nn.Module):
    """`image` float32 [batch, 1, 16, 16] -> logits [batch, 10].

    The 8x8 map before the self-attention gives 64 tokens; the classifier sees four of them.
    """

    def __init__(self, channels: int = 32, dim: int = 48, heads: int = 3, chosen_tokens: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(1, channels, 3), nn.ReLU())
        self.se_block = SqueezeExcitationBlock(channels)
        self.cbam_block = CbamBlock(channels, dim)
        self.register_buffer("positions", sinusoidal_positions(8, 8, dim), persistent=False)
        self.transformer = TransformerBlock(dim, heads, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        self.hard_attention = HardAttention(dim, chosen_tokens)
        self.classifier = nn.Linear(dim, len(LABELS))

    def forward(self, image: Tensor) -> Tensor:
        features = self.cbam_block(self.se_block(self.stem(image)))
        tokens = features.flatten(2).transpose(1, 2) + self.positions  # [batch, 64, dim]
        tokens = self.norm(self.transformer(tokens))
        return self.classifier(self.hard_attention(tokens))


def build() -> DemoNet:
    """The trained network in eval mode."""
    from safetensors.torch import load_file

    model = DemoNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
