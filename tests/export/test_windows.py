"""Windows of tokens: partition, shift and padding become the index map of one operator, in the natural order of tokens;
where something looks into the windows they stay, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.recognize.site import Kind
from attn_deploy.export.rewrite import RewrittenModel

Rewritten = Callable[..., RewrittenModel]
HEIGHT, WIDTH, WINDOW, DIM, HEADS = 4, 6, 2, 8, 2
LENGTH = WINDOW * WINDOW
MAP = f"x=1x{HEIGHT}x{WIDTH}x{DIM}"

PARTITION = {"permute", "transpose"}
SHIFT = {"roll"}
PADDING = {"pad", "slice"}


def partition(x: Tensor) -> Tensor:
    """[batch, height, width, channels] -> [batch * windows, length, channels], as Swin does."""
    _, height, width, channels = x.shape
    x = x.reshape(-1, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, LENGTH, channels)


def reverse(windows: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    windows = windows.reshape(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, windows.shape[-1])
    return windows.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, windows.shape[-1])


class Attention(nn.Module):
    """Self-attention within each of [windows, length, channels]; `mix` takes query, key and value with heads."""

    def __init__(self, mix: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.qkv, self.proj, self.mix = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), mix

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, HEADS, DIM // HEADS)
        query, key, value = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mix(query, key, value, *extra).transpose(1, 2).flatten(2))


def with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The bias is [heads, length, length], or [windows, heads|1, length, length] for each window of a sample."""
    scores = query @ key.transpose(-2, -1) * 0.4
    if bias.dim() == 4:
        scores = scores.reshape(-1, *bias.shape[:1], *scores.shape[1:]) + bias
        return scores.flatten(0, 1).softmax(-1) @ value
    return (scores + bias).softmax(-1) @ value


def cosine(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    return (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * scale).softmax(-1) @ value


class Net(nn.Module):
    """Layers for `path` to use, which is what a case is."""

    def __init__(self, path: Callable[[Net, Tensor], Tensor], mix: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.path = path
        self.attn, self.attn2 = Attention(mix), Attention(mix)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.embed, self.conv = nn.Parameter(torch.randn(LENGTH, DIM)), nn.Conv2d(DIM, DIM, 1)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) * 5 + 1)
        self.register_buffer("mask", shift_mask())

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self, x)

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh"))


def shift_mask() -> Tensor:
    """[windows, 1, length, length]: tokens that a shift by one brought together do not see each other."""
    region = torch.zeros(1, HEIGHT, WIDTH, 1)
    region[:, -1:] += 1
    region[:, :, -1:] += 2
    region = partition(region).squeeze(-1)
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)[:, None]


# What can stay in the natural order.


def plain(net: Net, x: Tensor) -> Tensor:
    return reverse(net.attn(partition(x)))


def biased(net: Net, x: Tensor) -> Tensor:
    return reverse(net.attn(partition(x), net.bias))


def shifted(net: Net, x: Tensor) -> Tensor:
    windows = net.attn(partition(x.roll((-1, -1), (1, 2))), net.mask + net.bias)
    return x + reverse(windows).roll((1, 1), (1, 2))


def padded(net: Net, x: Tensor) -> Tensor:
    """5 x 7 positions, which the window does not divide."""
    windows = net.attn(partition(F.pad(net.norm(x), (0, 0, 0, 1, 0, 1))))
    return x + reverse(windows, 6, 8)[:, :5, :7]


def normed_padding(net: Net, x: Tensor) -> Tensor:
    """A zero token is none any longer behind a LayerNorm."""
    windows = net.attn(net.norm(partition(F.pad(x, (0, 0, 1, 1, 1, 1)))))
    return reverse(windows, 6, 8)[:, 1:5, 1:7]


def padded_behind_the_projection_in_windows(net: Net, x: Tensor) -> Tensor:
    qkv = partition(F.pad(net.attn.qkv(x), (0, 0, 1, 1, 1, 1)))
    query, key, value = qkv.reshape(-1, LENGTH, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def padded_behind_the_projection(net: Net, x: Tensor) -> Tensor:
    return reverse(padded_behind_the_projection_in_windows(net, x), 6, 8)[:, 1:5, 1:7]


def grid(net: Net, x: Tensor) -> Tensor:
    """Windows of tokens that are far apart (MaxViT: Tu et al. 2022, section 3.2)."""
    x = x.reshape(-1, WINDOW, HEIGHT // WINDOW, WINDOW, WIDTH // WINDOW, DIM)
    windows = net.attn(x.permute(0, 2, 4, 1, 3, 5).reshape(-1, LENGTH, DIM))
    windows = windows.reshape(-1, HEIGHT // WINDOW, WIDTH // WINDOW, WINDOW, WINDOW, DIM)
    return windows.permute(0, 3, 1, 4, 2, 5).reshape(-1, HEIGHT, WIDTH, DIM)


def unfolded(net: Net, x: Tensor) -> Tensor:
    """Channels-first, positions within a patch before the patches (MobileViT: Mehta and Rastegari 2022)."""
    rows, columns = HEIGHT // WINDOW, WIDTH // WINDOW
    y = net.conv(x.permute(0, 3, 1, 2)).reshape(-1, rows, WINDOW, columns, WINDOW).transpose(2, 3)
    y = y.reshape(-1, DIM, rows * columns, LENGTH).permute(0, 3, 2, 1).reshape(-1, rows * columns, DIM)
    y = net.mlp(y + net.attn(net.norm(y)))
    y = y.reshape(-1, LENGTH, rows * columns, DIM).permute(0, 3, 2, 1)
    y = y.reshape(-1, rows, columns, WINDOW, WINDOW).transpose(2, 3)
    return net.conv(y.reshape(-1, DIM, HEIGHT, WIDTH))


def axial(net: Net, x: Tensor) -> Tensor:
    """Along the rows, then along the columns (Ho et al. 2019)."""
    x = x + net.attn(x.reshape(-1, WIDTH, DIM)).reshape(-1, HEIGHT, WIDTH, DIM)
    columns = x.transpose(1, 2)
    mixed = net.attn2(columns.reshape(-1, HEIGHT, DIM)).reshape(-1, WIDTH, HEIGHT, DIM)
    return (columns + mixed).transpose(1, 2)


def strided(net: Net, x: Tensor) -> Tensor:
    """Every second token of a sequence together (Child et al. 2019)."""
    tokens = x.reshape(-1, HEIGHT * WIDTH // 2, 2, DIM).transpose(1, 2).reshape(-1, HEIGHT * WIDTH // 2, DIM)
    mixed = net.attn(tokens).reshape(-1, 2, HEIGHT * WIDTH // 2, DIM)
    return mixed.transpose(1, 2).reshape(-1, HEIGHT, WIDTH, DIM)


def blocks(net: Net, x: Tensor) -> Tensor:
    """Two whole blocks in the order of windows, as in torchvision's MaxViT."""
    y = partition(x)
    y = net.mlp(y + net.attn(net.norm(y)))
    y = torch.add(y, net.attn2(net.norm(y)), alpha=0.5)
    return reverse(y - y.mean(-1, keepdim=True))


def separate(net: Net, x: Tensor) -> Tensor:
    """Three projections, as in transformers' Swin: their weights are joined."""
    y = partition(x)
    parts = [F.linear(y, w, b) for w, b in zip(net.attn.qkv.weight.chunk(3), net.attn.qkv.bias.chunk(3), strict=True)]
    query, key, value = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
    return reverse(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def heads_outermost(net: Net, x: Tensor) -> Tensor:
    """Channels are [heads, 3, head_dim]: the projection's rows are put in another order."""
    qkv = net.attn.qkv(partition(x)).reshape(-1, LENGTH, HEADS, 3, DIM // HEADS)
    query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)
    return reverse(net.attn.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))


def cosines(net: Net, x: Tensor) -> Tensor:
    return reverse(net.attn(partition(x), net.scale))


def channels_first_exit(net: Net, x: Tensor) -> Tensor:
    return net.conv(reverse(net.attn(partition(x))).permute(0, 3, 1, 2))


def branches(net: Net, x: Tensor) -> Tensor:
    """Two attentions side by side whose sum is put back."""
    y = partition(x)
    return reverse(net.attn(y) + net.attn2(net.norm(y)))


@dataclass(frozen=True)
class Moved:
    """`operators` of the sites; `gone` are kinds of movement of which nothing is left in the rewritten graph."""

    path: Callable[[Net, Tensor], Tensor]
    operators: Sequence[str] = ("PackedAttentionIndexed",)
    gone: frozenset[str] = frozenset(PARTITION)
    mix: Callable[..., Tensor] = F.scaled_dot_product_attention
    map: str = MAP


MOVED = (
    Moved(plain),
    Moved(biased, ["PackedAttentionIndexedBias"], mix=with_bias),
    Moved(shifted, ["PackedAttentionIndexedBias"], frozenset(PARTITION | SHIFT), with_bias),
    Moved(padded, ["PackedAttentionIndexedPadded"], frozenset(PARTITION | PADDING), map=f"x=1x5x7x{DIM}"),
    Moved(normed_padding, ["PackedAttentionIndexedPadded"], frozenset(PARTITION | PADDING)),
    Moved(padded_behind_the_projection, ["PackedAttentionIndexedPadded"], frozenset(PARTITION | PADDING)),
    Moved(grid),
    Moved(unfolded, gone=frozenset({"transpose"})),
    Moved(axial, ["PackedAttention", "PackedAttentionIndexed"]),
    Moved(strided),
    Moved(blocks, ["PackedAttentionIndexed"] * 2),
    Moved(separate),
    Moved(heads_outermost),
    Moved(cosines, ["PackedAttentionIndexedCosine"], mix=cosine),
    Moved(channels_first_exit, gone=frozenset({"transpose"})),
    Moved(branches, ["PackedAttentionIndexed"] * 2),
)


def movements(model: RewrittenModel) -> list[str]:
    """The names of the operators in the rewritten graph: `roll` of aten.roll.default."""
    targets = (str(n.target) for n in model.program.graph.nodes if n.op == "call_function")
    return [t.split(".")[1] for t in targets if t.startswith("aten.")]


ALSO_SLOW = (plain, padded_behind_the_projection, strided, blocks, channels_first_exit)
"""Under `make test-all`: biased or shifted, normed_padding, grid, branches and unfolded differ from them in little."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.path.__name__, marks=pytest.mark.slow if case.path in ALSO_SLOW else ())
        for case in MOVED
    ],
)
def test_windows_become_an_index_map_and_nothing_is_moved(case: Moved, rewritten: Rewritten) -> None:
    model = rewritten(Net(case.path, case.mix), case.map, onnx=True)
    assert model.skipped == ()
    assert [s.operator for s in model.sites] == list(case.operators)
    assert {s.kind for s in model.sites} == {Kind.WINDOW_ATTENTION}
    modules = {s.module for s in model.sites}
    assert modules <= {"", "attn", "attn2"}
    assert not case.gone & set(movements(model))


def test_a_shifted_layer_keeps_each_distinct_bias_once(rewritten: Rewritten) -> None:
    model = rewritten(Net(shifted, with_bias), MAP)
    (node,) = [n for n in model.program.graph.nodes if n.name == model.sites[0].node]
    bias = next(a for a in node.args if a is not None and getattr(a, "name", "") in tensors(model) and rank(a) == 4)
    assert tuple(bias.meta["val"].shape) == (4, HEADS, LENGTH, LENGTH)  # of 2 x 3 windows


def tensors(model: RewrittenModel) -> set[str]:
    return {n.name for n in model.program.graph.nodes if n.op == "placeholder"}


def rank(node: torch.fx.Node) -> int:
    return len(node.meta["val"].shape)


@pytest.mark.parametrize("path", [separate, heads_outermost], ids=lambda path: path.__name__)
def test_projections_become_one_of_packed_order(path: Callable[[Net, Tensor], Tensor], rewritten: Rewritten) -> None:
    model = rewritten(Net(path, F.scaled_dot_product_attention), MAP)
    widths = [n.meta["val"].shape[-1] for n in model.program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert widths.count(3 * DIM) == 1
    assert "index_select" not in movements(model)


# What must stay in windows, since something looks into them.


def pooled(net: Net, x: Tensor) -> Tensor:
    return net.attn(partition(x)).mean(1)


def pooled_beside(net: Net, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[misc]
    """The second attention would hang in the air without the first."""
    y = partition(x)
    y = y + net.attn(net.norm(y))
    return y.amax(1), reverse(y + net.attn2(net.norm(y)))


def padded_behind_the_projection_and_pooled(net: Net, x: Tensor) -> Tensor:
    """What a query of padding gives counts as well, and is written nowhere by the operator."""
    return padded_behind_the_projection_in_windows(net, x).mean(1)


def embedded(net: Net, x: Tensor) -> Tensor:
    return reverse(net.attn(partition(x) + net.embed))


def embedded_behind(net: Net, x: Tensor) -> Tensor:
    return reverse(net.attn(partition(x)) + net.embed)


def given_away(net: Net, x: Tensor) -> Tensor:
    return net.attn(partition(x))


def flattened(net: Net, x: Tensor) -> Tensor:
    return net.attn(partition(x)).reshape(-1)


def with_a_prefix(net: Net, x: Tensor) -> Tensor:
    windows = net.attn(partition(x))
    prefix = net.embed[:1].expand(windows.shape[0], 1, DIM)
    return torch.cat([prefix, windows], 1).reshape(-1, 6 * (LENGTH + 1), DIM)


def beside_other_channels(net: Net, x: Tensor) -> Tensor:
    y = partition(x)
    return reverse(torch.cat([net.attn(y), y], -1))


def normed_over_windows(net: Net, x: Tensor) -> Tensor:
    return reverse(F.layer_norm(net.attn(partition(x)), (LENGTH, DIM)))


def mixed_between_tokens(net: Net, x: Tensor) -> Tensor:
    y = net.attn(partition(x))
    return reverse(y + y.mean(1, keepdim=True))


def never_cut(net: Net, x: Tensor) -> Tensor:
    """Padding that stays in the output."""
    y = partition(F.pad(x, (0, 0, 1, 1, 1, 1)))
    return reverse(y + net.attn(net.norm(y)), 6, 8)


def times_the_batch(net: Net, x: Tensor) -> Tensor:
    return reverse(net.attn(partition(x)) * x.shape[0])


LOOKED_INTO = (
    pooled, pooled_beside, embedded_behind, given_away, flattened, with_a_prefix, beside_other_channels,
    normed_over_windows, mixed_between_tokens, never_cut, times_the_batch, embedded,
)  # fmt: skip


@pytest.mark.parametrize("path", LOOKED_INTO, ids=lambda path: path.__name__)
def test_windows_that_are_looked_into_stay(path: Callable[[Net, Tensor], Tensor], rewritten: Rewritten) -> None:
    model = rewritten(Net(path, F.scaled_dot_product_attention), MAP, onnx=path in (pooled_beside, never_cut))
    assert model.skipped == ()
    assert {s.operator for s in model.sites} == {"PackedAttention"}
    assert {s.kind for s in model.sites} == {Kind.WINDOW_ATTENTION}
    assert "permute" in movements(model)


# What is no index map.


def overlapping(net: Net, x: Tensor) -> Tensor:
    """Each window of 3 x 3 begins one step behind the last."""
    windows = x.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).reshape(-1, 9, DIM)
    return net.attn(net.norm(windows)).reshape(-1, 2 * 4, 9, DIM)


def halo(net: Net, x: Tensor) -> Tensor:
    """Keys and values around the queries (HaloNet: Vaswani et al. 2021, section 3.1)."""
    query = net.attn.proj(partition(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    around = F.unfold(F.pad(net.fc1(x).permute(0, 3, 1, 2), (1, 1, 1, 1)), 4, stride=WINDOW)
    around = around.reshape(-1, 2 * DIM, 16, 6).permute(0, 3, 2, 1).reshape(-1, 16, 2 * DIM)
    key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in around.chunk(2, -1))
    return reverse(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def samples_inside(net: Net, x: Tensor) -> Tensor:
    """The windows of all samples at one place follow one another: no sample's windows stand together."""
    rows, columns = HEIGHT // WINDOW, WIDTH // WINDOW
    y = x.reshape(-1, rows, WINDOW, columns, WINDOW, DIM).permute(1, 3, 0, 2, 4, 5).reshape(-1, LENGTH, DIM)
    y = net.attn(y).reshape(rows, columns, -1, WINDOW, WINDOW, DIM)
    return y.permute(2, 0, 3, 1, 4, 5).reshape(-1, HEIGHT, WIDTH, DIM)


def rolled_over_samples(net: Net, x: Tensor) -> Tensor:
    """At batch sizes 1, 2, 3 and 6 the roll does nothing."""
    return reverse(net.attn(partition(x.roll(6, 0))))


NO_INDEX_MAP = (overlapping, halo, samples_inside, padded_behind_the_projection_and_pooled)


@pytest.mark.parametrize("path", NO_INDEX_MAP, ids=lambda path: path.__name__)
def test_what_the_operator_cannot_address_stays_apart(
    path: Callable[[Net, Tensor], Tensor], rewritten: Rewritten
) -> None:
    model = rewritten(Net(path, F.scaled_dot_product_attention), MAP, onnx=True)
    assert [(s.operator, s.kind) for s in model.sites] == [("Attention", Kind.WINDOW_ATTENTION)]


def test_movement_along_the_batch_is_not_taken_for_what_it_is_at_the_example(rewritten: Rewritten) -> None:
    model = rewritten(Net(rolled_over_samples, F.scaled_dot_product_attention), MAP)
    assert [s.operator for s in model.sites] == ["PackedAttentionIndexed"]
    assert movements(model).count("roll") == 1
