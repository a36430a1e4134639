"""What each parameter and norm statistic is drawn from, by its module's class, its name and its shape."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

_TABLES = ("relative_position", "rel_pos", "rel_h", "rel_w", "_rel", "bias_table", "attention_bias")
_TOKENS = ("token", "pos", "cls", "embed", "query", "latent", "probe")


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _draw(module: nn.Module, leaf: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Values for a parameter or norm statistic, by its module's class, its name and its shape."""
    normal = torch.randn(shape, generator=rng)
    uniform = torch.rand(shape, generator=rng)
    is_projection = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    is_matrix = leaf == "weight" and (is_projection or is_embedding)
    is_vector = sum(size > 1 for size in shape) <= 1 and not is_matrix
    is_bias = "bias" in leaf or "mean" in leaf or leaf.endswith("beta")
    has_statistics = hasattr(module, "running_mean")
    if is_vector and (has_statistics or "norm" in type(module).__name__.lower()):
        if is_bias:
            # Around 0 a ReLU adds 1.7 dB to noise, around 0.5 it adds 1.0 dB (seresnet50 in all: 18 dB, 9 dB).
            return 0.2 * normal + (0.5 if has_statistics and leaf == "bias" else 0.0)
        # About two channels in a hundred are the activation outliers of trained transformers. CNNs have smaller ones:
        # with those of transformers, INT8 with ranges per tensor leaves 18 dB on efficientnet_b0, with these 21 dB.
        outliers = torch.randperm(shape.numel(), generator=rng)[: math.ceil(0.02 * shape.numel() - 0.5)]
        weight = 0.6 + uniform
        low, high = (1.6, 2.0) if has_statistics else (3.0, 4.0)
        weight.view(-1)[outliers] = low + (high - low) * uniform.view(-1)[outliers]
        return weight
    if "logit_scale" in leaf:
        return math.log(10.0) + 0.2 * normal
    if any(part in leaf for part in _TABLES):
        return normal
    if is_vector and is_bias:
        return 0.1 * normal
    if is_vector and not any(part in leaf for part in _TOKENS):
        # Layer scales, temperatures, PReLU slopes: never zero. A projection's own gain (weight norm) keeps its scale.
        return (0.7 if is_projection else 0.4) + 0.6 * uniform
    if not is_projection and (is_embedding or is_vector or (len(shape) >= 3 and shape[0] == 1) or "pos" in leaf):
        return 0.5 * normal
    if type(module).__name__ == "Conv1D" or (len(shape) == 3 and not is_projection):
        return normal / math.sqrt(shape[-2])  # transformers' Conv1D, stacks of experts: [..., in, out]
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return normal / math.sqrt(shape[0] * shape[2:].numel() if transposed else shape[1:].numel())


def fill(module: nn.Module, seed: int) -> tuple[str, ...]:
    """Draws every parameter and the buffers of norms; tied tensors once, under their first name."""
    done: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        buffers = owner._buffers if hasattr(owner, "running_mean") else {}
        for leaf, tensor in (*owner._parameters.items(), *buffers.items()):
            if tensor is not None and id(tensor) not in done and tensor.is_floating_point():
                done[id(tensor)] = name = f"{prefix}.{leaf}".lstrip(".")
                tensor.data.copy_(_draw(owner, leaf, tensor.shape, generator(seed, name)))
    return tuple(done.values())
