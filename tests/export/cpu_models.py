"""Transformers in miniature, each with what another one has not, and their exports, for tests of the CPU's lowering."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.cpu_units import LEVELS, Unit, fusible_units
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import RewrittenModel, rewrite
from attn_deploy.export.sources import LoadedSource
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import parse_input
from attn_deploy.ops import FORMS
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision

DIM, HEADS = 16, 2


class Attention(nn.Module):
    """Self-attention with one projection for query, key and value; `causal` or not."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.causal = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), causal

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """Attention with three projections; key and value of `memory`, `mask` [batch, key_len] true where a key is seen."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM, bias=bias) for _ in range(3))
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = (f(memory).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.key, self.value))
        seen = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.dense(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, activation: nn.Module, hidden: int = 24) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, hidden), activation, nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PreNorm(nn.Module):
    """A layer of the Vision Transformer; `layer_scale` as in CaiT."""

    def __init__(self, attention: nn.Module, activation: nn.Module, layer_scale: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn, self.mlp = attention, FeedForward(activation)
        self.gamma1 = nn.Parameter(torch.rand(DIM)) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.rand(DIM)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(self.norm1(x))
        x = x + (mixed if self.gamma1 is None else mixed * self.gamma1)
        hidden = self.mlp(self.norm2(x))
        return x + (hidden if self.gamma2 is None else hidden * self.gamma2)


class VisionTransformer(nn.Module):
    """x [batch, 3, 8, 8] -> [batch, 5], from the class token."""

    INPUTS = ("x=1x3x8x8",)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.Sequential(
            PreNorm(Attention(), nn.GELU(), layer_scale=True), PreNorm(Attention(), nn.GELU(approximate="tanh")),
            PreNorm(Attention(), nn.GELU()),
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(DIM, eps=1e-6), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Windowed(nn.Module):
    """Attention in windows of 2 x 2 of [batch, 4, 4, channels], shifted or not, with a bias of its own."""

    SIDE, WINDOW = 4, 2

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.shift = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), int(shifted)
        self.bias = nn.Parameter(torch.randn(HEADS, self.WINDOW**2, self.WINDOW**2))

    def forward(self, x: Tensor) -> Tensor:
        count, side = self.SIDE // self.WINDOW, self.WINDOW
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        windows = x.reshape(-1, count, side, count, side, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, DIM)
        query, key, value = self.qkv(windows).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * (DIM // HEADS) ** -0.5 + self.bias
        mixed = self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        back = mixed.reshape(-1, count, count, side, side, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, DIM)
        return torch.roll(back, (self.shift, self.shift), (1, 2)) if self.shift else back


class WindowTransformer(nn.Module):
    """x [batch, 3, 8, 8] -> [batch, 5]: two layers as Swin's on [batch, height, width, channels], then the mean."""

    INPUTS = ("x=1x3x8x8",)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 2, 2)
        self.blocks = nn.Sequential(*(PreNorm(Windowed(shifted), nn.GELU()) for shifted in (False, True)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).permute(0, 2, 3, 1))).mean((1, 2)))


class PostNormEncoder(nn.Module):
    """x [batch, 6, 16], mask [batch, 6] -> [batch, 6, 16]: two layers as BERT's, norms behind the sums."""

    INPUTS = ("x=1x6x16", "mask=1x6:bool")

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([Separate(), Separate(bias=False)])
        self.mlp = nn.ModuleList(FeedForward(nn.GELU()) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = self.norms[2 * layer](attention(x, x, mask) + x)
            x = self.norms[2 * layer + 1](mlp(x) + x)
        return x


class Decoder(nn.Module):
    """x [batch, 5, 16], memory [batch, 7, 16] -> [batch, 5, 16]: causal, then of a memory; two layers share weights."""

    INPUTS = ("x=1x5x16", "memory=1x7x16")

    def __init__(self) -> None:
        super().__init__()
        self.own = PreNorm(Attention(causal=True), nn.SiLU())
        self.norm, self.cross = nn.LayerNorm(DIM), Separate()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for _ in range(2):
            x = self.own(x)
            x = x + self.cross(self.norm(x), memory)
        return x


class GatedConvolutions(nn.Module):
    """x [batch, 3, 8, 8] -> [batch, 5]: a residual block with squeeze-and-excitation as in SE-ResNet, and a stem."""

    INPUTS = ("x=1x3x8x8",)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, DIM, 3, 2, 1), nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.fc1, self.fc2 = nn.Conv2d(DIM, 4, 1), nn.Conv2d(4, DIM, 1)
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv2(F.relu(self.conv1(x)))
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(y * gate + x).mean((2, 3)))


TRANSFORMERS = (VisionTransformer, WindowTransformer, PostNormEncoder, Decoder)
MODELS: dict[str, type[nn.Module]] = {model.__name__: model for model in (*TRANSFORMERS, GatedConvolutions)}
ALL = frozenset(FORMS)


@dataclass(frozen=True)
class Made:
    captured: CapturedModel
    rewritten: RewrittenModel
    canonical: CanonicalModel

    def units(self, kernels: frozenset[str] = ALL) -> dict[str, Unit]:
        return {unit.name: unit for unit in fusible_units(self.canonical, kernels)}

    def lower(self, level: str | None, kernels: frozenset[str] = ALL) -> ir.Model:
        """Every unit at this level or the next plainer one that it has; None for the recipe's own choice."""
        fuse = None if level is None else {u.name: plainer(level, u) for u in self.units(kernels).values()}
        return onnxruntime_cpu.lower(self.canonical, Precision.FP32, native=kernels, fuse=fuse).model


def plainer(level: str, unit: Unit) -> str:
    return next(found for found in reversed(LEVELS[: LEVELS.index(level) + 1]) if found in unit.levels)


@functools.cache
def exported(name: str) -> Made:
    """Each model is exported once in a process."""
    torch.manual_seed(1)
    module = MODELS[name]().eval()
    inputs = tuple(parse_input(text) for text in module.INPUTS)  # type: ignore[union-attr]
    model = capture(LoadedSource("tiny", "tiny", module, inputs, "as they are"), {"batch": DimBounds()})
    rewritten = rewrite(model, recognize(model))
    return Made(model, rewritten, to_onnx(rewritten))
