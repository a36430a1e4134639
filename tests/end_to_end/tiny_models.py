"""Small models, each the smallest that shows one thing; sources as `tiny_models:NAME`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = torch.zeros(1, 3, 16, 16)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 4, 1)
        self.up = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class GatedNet(nn.Module):
    """An SE gate and a CBAM-like spatial gate between convolutions: x [batch, 3, 16, 16] -> [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.channels = SqueezeExcitation(16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.pixels = SpatialGate()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pixels(self.middle(self.channels(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention over [batch, tokens, dim], with three projections of its own."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class WindowAttention(nn.Module):
    """Self-attention in windows of 4 x 4 of a map [batch, height, width, dim], with a bias per relative position."""

    SIDE, HEADS = 4, 2

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * self.SIDE - 1) ** 2, self.HEADS))
        place = torch.stack(torch.meshgrid(*[torch.arange(self.SIDE)] * 2, indexing="ij")).flatten(1)
        steps = place[:, :, None] - place[:, None] + self.SIDE - 1
        self.register_buffer("place", steps[0] * (2 * self.SIDE - 1) + steps[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        side = self.SIDE
        windows = x.reshape(-1, height // side, side, width // side, side, dim).transpose(2, 3)
        tokens = windows.reshape(-1, side * side, dim)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.place].permute(2, 0, 1)
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + bias
        mixed = self.projection((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return mixed.reshape(windows.shape).transpose(2, 3).reshape(x.shape)


class WindowedNet(nn.Module):
    """Patches of 2, two residual window attentions: x [batch, 3, height, width] -> [batch, 5], for sides of 8 n."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.blocks = nn.ModuleList(WindowAttention(16) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean((1, 2)))


class ScaledAttention(nn.Module):
    """x + layer_scale * attention(x): with a scale of 0 the attention does not matter."""

    def __init__(self, layer_scale: float) -> None:
        super().__init__()
        self.attention = Attention(16)
        self.layer_scale = nn.Parameter(torch.full((16,), layer_scale))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.layer_scale * self.attention(x)).mean(1))


class Constant(nn.Module):
    """Gives the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3))) * 0 + 1


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Branching(nn.Module):
    """Steers a branch by a tensor's value, in its submodule `decide`."""

    def __init__(self) -> None:
        super().__init__()
        self.decide = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(x).mean((2, 3))


class TwoInputs(nn.Module):
    """Tokens and an integer for each of them, the second by keyword only."""

    def __init__(self, kinds: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, 16)
        self.attention = Attention(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, *, kind: Tensor) -> dict[str, Tensor]:
        mixed = self.attention(x + self.embedding(kind))
        return {"scores": self.head(mixed.mean(1)), "tokens": mixed}


class Rearranged(nn.Module):
    """Nothing is computed: x [batch, 3, 16, 16] -> [batch, 768]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 16, 48).flatten(1)


def gated() -> Any:
    torch.manual_seed(0)
    return GatedNet(), {"x": IMAGE}


def scaled_attention(layer_scale: float = 1.0) -> Any:
    torch.manual_seed(0)
    return ScaledAttention(layer_scale), {"x": torch.zeros(1, 6, 16)}


def windowed() -> Any:
    torch.manual_seed(0)
    return WindowedNet(), {"x": IMAGE}


def rearranged() -> Any:
    return Rearranged(), {"x": IMAGE}


def constant() -> Any:
    return Constant(), {"x": IMAGE}


def branching() -> Any:
    return Branching(), {"x": IMAGE}


def two_inputs(kinds: int = 7) -> Any:
    torch.manual_seed(0)
    return TwoInputs(kinds), {"x": torch.zeros(1, 6, 16), "kind": torch.arange(6)[None]}
