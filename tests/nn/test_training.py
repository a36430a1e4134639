"""Every module of attn_deploy.nn trains: gradients reach all that can learn, and the loss falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.nn import HardAttention, MultiHeadAttention, NonLocalBlock, TransformerEncoderLayer


def loss_of(module: nn.Module, feeds: dict[str, Tensor]) -> Tensor:
    """Distance of the output to random numbers, always the same ones."""
    output = module(**feeds)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return F.mse_loss(output, target)


def test_gradients_reach_every_parameter_and_every_float_input(case: Any) -> None:
    """In the second step, which is the first in which all of a block that starts as the identity learns."""
    module = case.module().train()
    feeds = case.tensors(batch=4, seed=0)
    learning = {name: x.requires_grad_() for name, x in feeds.items() if x.is_floating_point()}
    learning |= dict(module.named_parameters())
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(module, feeds).backward()
        optimizer.step()
    # A tensor whose gradients cancel shows their rounding, 1e-8 here; a tensor that learns shows 1e-4 and more.
    silent = [n for n, p in learning.items() if p.grad is None or not p.grad.isfinite().all() or p.grad.norm() < 1e-6]
    assert silent == []


def test_the_loss_falls(learning_case: Any) -> None:
    module = learning_case.module().train()
    feeds = learning_case.tensors(batch=4, seed=0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(module, feeds)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_training_and_saving_keep_evaluation_the_same(case: Any) -> None:
    """A module loaded from a state dict computes what the saved one does: tables that are not saved are remade."""
    module = case.module().train()
    feeds = case.tensors(batch=2, seed=0)
    module(**feeds)  # moves the statistics of norms
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    fresh = case.module()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh.eval()(**feeds), module.eval()(**feeds), rtol=0, atol=0)


def test_hard_attention_learns_which_token_to_choose() -> None:
    """One token in eight carries a mark, and the loss wants it: only the gradient through the choice can teach that."""
    torch.manual_seed(0)
    module = HardAttention(6, 1)
    nn.init.constant_(module.score.weight[:, :1], -0.5)  # against the mark
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)

    def marked() -> Tensor:
        x = torch.randn(32, 8, 6)
        x[:, :, 0] = F.one_hot(torch.randint(8, (32,)), 8)
        return x

    def hits(x: Tensor) -> float:
        return module.eval()(x)[:, 0, 0].mean().item()

    before = hits(marked())
    for _ in range(100):
        optimizer.zero_grad()
        (-module.train()(marked())[:, 0, 0].mean()).backward()
        optimizer.step()
    assert before < 0.2
    assert hits(marked()) > 0.95


def test_the_choice_of_hard_attention_is_drawn_in_training_as_its_scores_say() -> None:
    """The first choice follows softmax(scores), the Gumbel-max property, and no token is chosen twice."""
    torch.manual_seed(0)
    module = HardAttention(5, 3).train()
    tokens = torch.eye(5).expand(20000, 5, 5)
    drawn = module(tokens)
    expected = module.score.weight[0].softmax(dim=0)
    assert (drawn[:, 0].mean(dim=0) - expected).abs().max() < 0.02  # 6 standard deviations
    assert torch.equal(drawn.sum(dim=1).round().unique(), torch.tensor([0.0, 1.0]))


def test_a_non_local_block_starts_as_the_identity() -> None:
    x = torch.randn(2, 8, 5, 4)
    assert torch.equal(NonLocalBlock(8).train()(x), x)


@pytest.mark.parametrize(
    "module",
    [MultiHeadAttention(16, 4, dropout=0.5), TransformerEncoderLayer(16, 4, 32, dropout=0.5)],
    ids=["attention", "layer"],
)
def test_dropout_acts_in_training_only(module: nn.Module) -> None:
    x = torch.randn(2, 6, 16)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
