"""How far a model lets its sequence go: found at capture, told when more was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attn_deploy import nn as attn_nn
from attn_deploy.errors import CaptureError, UsageError
from attn_deploy.export.capture import CapturedModel
from attn_deploy.inputs import make_feeds
from attn_deploy.session import DimBounds

sys.path.insert(0, str(Path(__file__).parent))  # for text_bodies

from text_bodies import BOTH, DIM, IDS, LENGTH, LONGEST, Mixed, Text, fused, triangle_of_a_buffer

Capture = Callable[..., CapturedModel]


class Positions(nn.Module):
    """A table looked up row by row: torch.export does not see where it ends."""

    def __init__(self, rows: int, first: int = 0) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(rows, DIM), first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]) + self.first)


class Pairs(nn.Module):
    """One vector for each pair of places closer than `reach`: such a table does not end the sequence."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.table, self.reach = nn.Embedding(reach, DIM), reach

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return x + self.table((places[:, None] - places).abs().clamp_max(self.reach - 1)).mean(1)


@pytest.mark.parametrize(
    ("body", "longest"),
    [
        (lambda: Positions(20), 20),
        (lambda: Positions(20, first=2), 18),
        (lambda: nn.Sequential(Positions(20), Positions(15)), 15),
        (lambda: Pairs(16), None),
        (lambda: attn_nn.LearnedPositionalEncoding(DIM, 20), 20),
        (lambda: Mixed(triangle_of_a_buffer), LONGEST - 1),
        (lambda: Mixed(fused), None),
    ],
    ids=["rows", "rows from the third on", "the shorter of two", "distances", "a slice", "a square slice", "none"],
)
def test_an_open_sequence_ends_where_the_model_does(
    body: Callable[[], nn.Module], longest: int | None, captured: Capture
) -> None:
    model = captured(Text(body()), IDS, dims=BOTH)
    assert model.dims == {"batch": DimBounds(), "sequence": DimBounds(2, longest)}
    feeds = make_feeds(model.inputs, batch=1, seed=0, sequence=longest or 60)
    assert model.reference(feeds)["output"].shape == (1, longest or 60, DIM)


@pytest.mark.parametrize("body", [Positions(20), attn_nn.LearnedPositionalEncoding(DIM, 20)], ids=["rows", "a slice"])
def test_a_bound_beyond_the_model_is_refused_with_the_one_that_works(body: nn.Module, captured: Capture) -> None:
    with pytest.raises(CaptureError, match="does not take sequences of every length") as caught:
        captured(Text(body), IDS, dims={"batch": DimBounds(), "sequence": DimBounds(2, 64)})
    assert (caught.value.got, caught.value.expected) == ("2 to 64", "2 to 20")
    assert caught.value.next_step == "--dynamic sequence=2:20"
    within = {"batch": DimBounds(), "sequence": DimBounds(3, 16)}
    assert captured(Text(body), IDS, dims=within).dims == within


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(LENGTH, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class FoursOfTokens(nn.Module):
    """Attention within four tokens each: lengths that four does not divide do not work."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mixed(fused)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 4, DIM)).reshape(x.shape)


@pytest.mark.parametrize("body", [FixedLength(), FoursOfTokens()], ids=["added table", "fours"])
def test_a_model_that_fixes_its_length_says_how_to_export_it(body: nn.Module, captured: Capture) -> None:
    with pytest.raises(CaptureError, match="the model cannot be traced") as caught:
        captured(Text(body), IDS, dims=BOTH)
    assert "the sequence is dynamic" in str(caught.value.got)
    assert "--dynamic batch" in str(caught.value.next_step)
    assert captured(Text(body), IDS, dims={"batch": DimBounds()}).sequence is None


@pytest.mark.parametrize(("length", "bounds"), [(LENGTH, DimBounds(16)), (LENGTH, DimBounds(2, 8)), (1, DimBounds(1))])
def test_an_example_out_of_the_asked_bounds_is_refused(length: int, bounds: DimBounds, captured: Capture) -> None:
    with pytest.raises(UsageError, match="the example's sequence is out of the asked bounds") as caught:
        captured(Text(), f"ids=1x{length}:int64:50", dims={"batch": DimBounds(), "sequence": bounds})
    assert caught.value.got == f"ids=1x{length}:int64"
