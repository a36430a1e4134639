"""Multiply-adds and bytes of whole models, against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.capture import capture
from attn_deploy.export.recognize import recognize
from attn_deploy.export.recognize.site import Findings
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources.base import LoadedSource
from attn_deploy.export.work import Work, count_work
from attn_deploy.inputs import ExampleInput
from attn_deploy.session import DimBounds


def work_of(module: nn.Module, *shape: int, find: Any = recognize, dynamic: bool = True) -> Work:
    source = LoadedSource("x", "x", module.eval(), (ExampleInput("x", shape),), "random")
    captured = capture(source, {"batch": DimBounds()} if dynamic else {})
    return count_work(rewrite(captured, find(captured)))


class Attention(nn.Module):
    """[batch, 6, 8] in two heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


LINEAR_FLOPS = 2 * (6 * 8 * 24 + 6 * 8 * 5)
SITE_FLOPS = 2 * 2 * (2 * 6 * 6 * 4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_attention_and_its_projections(dynamic: bool) -> None:
    work = work_of(Attention(), 1, 6, 8, dynamic=dynamic)
    assert (work.flops, work.site_flops) == (LINEAR_FLOPS + SITE_FLOPS, SITE_FLOPS)
    qkv, packed, proj = 6 * 8 + 24 * 8 + 24 + 6 * 24, 6 * 24 + 6 * 8, 6 * 8 + 5 * 8 + 5 + 6 * 5
    assert work.site_bytes == 4 * packed
    assert work.bytes == 4 * (qkv + packed + proj)


def test_an_attention_that_is_no_site_counts_as_much_and_has_no_share() -> None:
    work = work_of(Attention(), 1, 6, 8, find=lambda captured: Findings())
    assert (work.flops, work.site_flops, work.site_bytes) == (LINEAR_FLOPS + SITE_FLOPS, 0, 0)


class Products(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 7))
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    ("body", "shape", "multiply_adds"),
    [
        (lambda m, x: x @ m.weight, (1, 3, 6), 3 * 6 * 7),
        (lambda m, x: torch.einsum("btc,cd->btd", x, m.weight), (1, 3, 6), 3 * 6 * 7),
        (lambda m, x: torch.einsum("...c,cd->...d", x, m.weight), (1, 3, 6), 3 * 6 * 7),
        (lambda m, x: torch.bmm(x, x.transpose(1, 2)), (1, 3, 6), 3 * 3 * 6),
        (lambda m, x: m.conv(x), (1, 4, 8, 8), 6 * 4 * 4 * 2 * 3 * 3),
        (lambda m, x: m.up(x), (1, 4, 8, 8), 4 * 8 * 8 * 6 * 3 * 3),
        (lambda m, x: F.gelu(x) + 1, (1, 3, 6), 0),
    ],
    ids=["matmul", "einsum", "einsum with an ellipsis", "bmm", "grouped convolution", "transposed convolution", "none"],
)
def test_every_product_is_counted(body: Any, shape: tuple[int, ...], multiply_adds: int) -> None:
    assert work_of(Products(body), *shape).flops == 2 * multiply_adds
