"""The residual trunk and its three attentions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.nn import CBAM, EfficientChannelAttention, SqueezeExcitation
from cifar_nets import CLASSES, weights_file

ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "se": lambda channels: SqueezeExcitation(channels, reduction=8),
    "cbam": lambda channels: CBAM(channels, reduction=8),
    "eca": EfficientChannelAttention,
}
"""By the network's name: channels -> an attention over [batch, channels, height, width]."""

STEM_WIDTH = 16
STAGES = ((32, 1), (64, 2), (128, 2))
"""Channels and blocks of each stage. Each begins with a stride of 2: the maps are 16, 8 and 4 pixels wide."""


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class AttentionBlock(nn.Module):
    """relu(attention(f(x)) + shortcut(x)), f two convolutions of 3x3: the basic block of He et al., "Deep Residual
    Learning for Image Recognition", CVPR 2016, with the attention where Hu et al. put theirs (CVPR 2018, figure 3).

    [batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride].
    """

    def __init__(self, inputs: int, outputs: int, stride: int, attention: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, 3, stride), nn.ReLU(), _conv(outputs, outputs, 3))
        self.attention = attention
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.attention(self.body(x)) + self.shortcut(x))


class CifarNet(nn.Module):
    """`image` float32 [batch, 3, 32, 32], prepared as preprocess.json says -> logits [batch, 10]. `attention` is one of
    ATTENTIONS."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, STEM_WIDTH, 3), nn.ReLU())
        blocks: list[nn.Module] = []
        width = STEM_WIDTH
        for channels, count in STAGES:
            for number in range(count):
                made = ATTENTIONS[attention](channels)
                blocks.append(AttentionBlock(width, channels, 2 if number == 0 else 1, made))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, len(CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(image)).mean(dim=(2, 3)))


def build(name: str) -> CifarNet:
    """The trained network in eval mode."""
    from safetensors.torch import load_file

    network = CifarNet(name)
    network.load_state_dict(load_file(weights_file(name)))
    return network.eval()


Source = tuple[nn.Module, dict[str, Tensor]]


def se() -> Source:
    """A source for `attn-deploy export`, as the two below."""
    return build("se"), {"image": torch.zeros(1, 3, 32, 32)}


def cbam() -> Source:
    return build("cbam"), {"image": torch.zeros(1, 3, 32, 32)}


def eca() -> Source:
    return build("eca"), {"image": torch.zeros(1, 3, 32, 32)}
