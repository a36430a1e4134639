"""Small text models; sources as `text_models:NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_deploy import nn as attn_nn

WORDS, DIM, HEADS, LONGEST = 50, 16, 2, 40


class Classifier(nn.Module):
    """ids and mask [batch, sequence] -> scores [batch, 3] and tokens [batch, sequence, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, DIM)
        self.position = attn_nn.LearnedPositionalEncoding(DIM, LONGEST)
        self.layers = nn.ModuleList(attn_nn.TransformerEncoderLayer(DIM, HEADS, 32) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.position(self.embedding(ids))
        for layer in self.layers:
            x = layer(x, mask=mask[:, None, None, :])
        x = self.norm(x)
        return {"scores": self.head(x.mean(1)), "tokens": x}


def classifier() -> Any:
    torch.manual_seed(0)
    return Classifier(), {"ids": torch.arange(12)[None], "mask": torch.ones(1, 12, dtype=torch.bool)}


def sentences() -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Data: 24 samples of 3 to 20 words, each with a class."""
    draw = np.random.default_rng(7)
    for number in range(24):
        length = int(draw.integers(3, 21))
        ids = draw.integers(0, WORDS, length)
        yield {"ids": ids, "mask": np.arange(length) < length - number % 3}, int(ids.sum() % 3)
