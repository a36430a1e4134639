"""Where elements and tokens come from, read off small graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import constants
from attn_deploy.export.recognize.layout import Layout

Capture = Callable[..., CapturedModel]
BATCH, TOKENS, DIM = 2, 4, 3


class Path(nn.Module):
    def __init__(self, path: Callable[[Path, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.path, self.norm, self.linear = path, nn.LayerNorm(DIM), nn.Linear(DIM, 2)
        self.gain, self.places = nn.Parameter(torch.rand(DIM)), nn.Parameter(torch.rand(TOKENS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self, x)


def read(captured: Capture, path: Callable[[Path, Tensor], Tensor]) -> tuple[Layout, Node, Node]:
    """The layout, the input's node and the output's."""
    program = captured(Path(path), f"x=1x{TOKENS}x{DIM}").program
    nodes = list(program.graph.nodes)
    return Layout(constants(program)), next(n for n in nodes if n.name == "x"), nodes[-1].args[0][0]


NUMBERS = torch.arange(1, BATCH * TOKENS * DIM + 1).reshape(BATCH, TOKENS, DIM)

MOVEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permute and reshape": lambda x: x.transpose(1, 2).reshape(-1, 2, TOKENS * DIM // 2),
    "roll": lambda x: x.roll(1, 1),
    "padding": lambda x: F.pad(x, (0, 0, 1, 2)),
    "cropping": lambda x: F.pad(x, (0, 0, -1, 0)),
    "reflection": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "slices put together": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "overlap": lambda x: x.unfold(1, 2, 1),
    "im2col": lambda x: F.unfold(x[:, None], 2),
    "repetition": lambda x: x.repeat_interleave(2, 1),
    "look-up": lambda x: x[:, torch.tensor([3, 0, 0])],
    "a part of several": lambda x: x.split(2, 1)[1],
}


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_elements_are_the_movement_of_numbers(movement: str, captured: Capture) -> None:
    layout, x, end = read(captured, lambda m, x: MOVEMENTS[movement](x))
    found = layout.elements(end)
    assert found.root is x
    expected = MOVEMENTS[movement](NUMBERS.double()).long()  # not every movement takes whole numbers
    assert torch.equal(found.ids, expected)


STOPS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "arithmetic": lambda m, x: (x + 1).transpose(1, 2),
    "two sources": lambda m, x: torch.cat([x, m.places.expand(x.shape[0], -1, -1)], 1),
    "padding with a number": lambda m, x: F.pad(x, (0, 0, 1, 0), value=1.0),
    "a roll over samples": lambda m, x: x.roll(2, 0),
    "a part of the samples' rows": lambda m, x: x.reshape(-1, DIM)[2:],
}


@pytest.mark.parametrize("case", STOPS)
def test_elements_end_at_what_is_no_movement(case: str, captured: Capture) -> None:
    layout, x, end = read(captured, STOPS[case])
    assert layout.elements(end).root is not x


def test_factors_are_passed_where_asked(captured: Capture) -> None:
    layout, x, end = read(captured, lambda m, x: (x * 0.5).transpose(1, 2) / 4)
    assert layout.elements(end).root is end
    found = layout.elements(end, through_scales=True)
    assert (found.root, found.factor) == (x, 0.125)
    assert torch.equal(found.ids, NUMBERS.transpose(1, 2))


def turned(x: Tensor) -> Tensor:
    """The tokens of each sample, last first, two by two."""
    return x.flip(1).reshape(-1, 2, DIM)


ORDER = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])

PER_TOKEN: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "nothing": lambda m, x: x,
    "LayerNorm": lambda m, x: m.norm(x),
    "Linear": lambda m, x: m.linear(x),
    "activation": lambda m, x: F.gelu(x, approximate="tanh"),
    "gain": lambda m, x: x * m.gain,
    "residual": lambda m, x: x + torch.relu(x),
    "minus its mean": lambda m, x: x - x.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("case", PER_TOKEN)
def test_tokens_keep_their_order_past_what_treats_all_alike(case: str, captured: Capture) -> None:
    layout, _, end = read(captured, lambda m, x: PER_TOKEN[case](m, turned(x)))
    found = layout.tokens(end)
    assert found is not None
    assert found.total == BATCH * TOKENS
    assert torch.equal(found.flat, ORDER)


BETWEEN_TOKENS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "softmax over tokens": lambda m, x: x.softmax(1),
    "a vector for each place": lambda m, x: x + m.places[:2],
    "minus the mean of tokens": lambda m, x: x - x.mean(1, keepdim=True),
    "LayerNorm over tokens": lambda m, x: F.layer_norm(x, (2, DIM)),
    "another order added": lambda m, x: x + x.flip(1),
    "channels apart": lambda m, x: x[..., :2],
}


@pytest.mark.parametrize("case", BETWEEN_TOKENS)
def test_tokens_are_lost_where_they_differ(case: str, captured: Capture) -> None:
    layout, _, end = read(captured, lambda m, x: BETWEEN_TOKENS[case](m, turned(x)))
    assert layout.tokens(end) is None


def test_padding_has_no_number_and_its_value_is_followed(captured: Capture) -> None:
    module = Path(lambda m, x: m.linear(m.norm(F.pad(x, (0, 0, 1, 0)))) * 2)
    layout, _, end = read(captured, module.path)
    found = layout.tokens(end)
    assert found is not None
    assert found.flat.tolist() == [-1, 0, 1, 2, 3, -1, 4, 5, 6, 7]
    assert found.fill is not None
    assert torch.equal(found.fill, module.linear(module.norm(torch.zeros(DIM))).detach() * 2)


LEAVING: dict[str, tuple[Callable[[Path, Tensor], Tensor], str | None]] = {
    "back": (lambda m, x: m.norm(turned(x)).reshape(-1, TOKENS, DIM).flip(1), "last"),
    "back, channels first": (
        lambda m, x: m.norm(turned(x)).reshape(-1, TOKENS, DIM).flip(1).transpose(1, 2),
        "first",
    ),
    "not yet": (lambda m, x: m.norm(turned(x)).reshape(-1, TOKENS, DIM), None),
    "in one row": (lambda m, x: m.norm(turned(x)).reshape(-1), None),
    "without one token": (lambda m, x: m.norm(turned(x)).reshape(-1, TOKENS, DIM).flip(1)[:, 1:], None),
    "without the padding": (lambda m, x: m.norm(F.pad(x, (0, 0, 1, 2)))[:, 1:-2], "last"),
}


@pytest.mark.parametrize("case", LEAVING)
def test_the_natural_order_is_restored_by_movement_alone(case: str, captured: Capture) -> None:
    path, place = LEAVING[case]
    layout, _, end = read(captured, path)
    assert layout.leaves(end) == place
