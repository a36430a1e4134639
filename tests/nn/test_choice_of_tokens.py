"""Soft and hard attention over tokens: their formulas, masks, and what they refuse. Learning is in test_training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_deploy.nn import HardAttention, SoftAttention


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 6, 8, dtype=torch.float64)


@pytest.mark.parametrize("with_query", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_attention_weighs_by_the_softmax_of_additive_scores(x: Tensor, with_query: bool, masked: bool) -> None:
    module = SoftAttention(8, hidden=5, query_dim=4 if with_query else None).double()
    w = {name: t.detach().numpy() for name, t in module.state_dict().items()}
    query = torch.randn(3, 4, dtype=torch.float64) if with_query else None
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [False, True] * 3]) if masked else None
    got = module(x, query, mask).detach().numpy()
    for sample in range(3):
        aligned = x[sample].numpy() @ w["tokens.weight"].T + w["tokens.bias"]
        if query is not None:
            aligned = aligned + query[sample].numpy() @ w["query.weight"].T
        weight = np.exp(np.tanh(aligned) @ w["score.weight"][0])
        if mask is not None:
            weight = weight * mask[sample].numpy()
        np.testing.assert_allclose(got[sample], weight / weight.sum() @ x[sample].numpy(), rtol=1e-12, atol=1e-12)


def test_a_token_that_does_not_count_has_no_influence_and_without_tokens_the_result_is_0(x: Tensor) -> None:
    module = SoftAttention(8).double()
    mask = torch.tensor([[True] * 5 + [False], [False] * 6, [True] * 5 + [False]])
    before = module(x, mask=mask)
    changed = x.clone()
    changed[:, 5] = 1e3
    assert torch.equal(module(changed, mask=mask), before)
    assert (before[1] == 0).all()
    before.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("k", [1, 3, 6])
def test_hard_attention_takes_the_best_tokens_best_first(x: Tensor, k: int) -> None:
    module = HardAttention(8, k).double().eval()
    scores = x.numpy() @ module.score.weight[0].detach().numpy()
    best = np.argsort(-scores, axis=1)[:, :k]
    expected = np.take_along_axis(x.numpy(), best[:, :, None], axis=1)
    assert np.array_equal(module(x).detach().numpy(), expected)


def test_in_training_too_each_output_is_one_of_the_tokens(x: Tensor) -> None:
    torch.manual_seed(0)
    chosen = HardAttention(8, 2).double().train()(x)
    distance = (chosen.unsqueeze(2) - x.unsqueeze(1)).abs().amax(3).amin(2)
    assert distance.max() < 1e-9


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_is_that_of_the_softmax_of_the_noisy_scores(x: Tensor, temperature: float) -> None:
    """With the noise drawn again from the same seed, the relaxed choice is written out and differentiated."""
    module = HardAttention(8, 2, temperature=temperature).double().train()
    toward = torch.randn(3, 2, 8, dtype=torch.float64)
    torch.manual_seed(5)
    (module(x) * toward).sum().backward()
    got = module.score.weight.grad

    weight = module.score.weight.detach().clone().requires_grad_()
    torch.manual_seed(5)
    noisy = (x @ weight[0]) - torch.empty(3, 6, dtype=torch.float64).exponential_().log()
    total = torch.zeros(())
    for sample in range(3):
        left = list(range(6))
        for choice in range(2):
            relaxed = (noisy[sample, left] / temperature).softmax(0)
            total = total + relaxed @ x[sample, left] @ toward[sample, choice]
            left.remove(left[int(noisy[sample, left].argmax())])
    total.backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-10, atol=1e-10)


SOFT, QUERIED, X = SoftAttention(8), SoftAttention(8, query_dim=4), torch.zeros(2, 6, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SoftAttention(8, hidden=0), "hidden: got 0"),
        (lambda: SoftAttention(8, query_dim=0), "query_dim: got 0"),
        (lambda: HardAttention(8, 0), "k: got 0"),
        (lambda: HardAttention(8, 2, temperature=0.0), "temperature: got 0.0, expected a positive number"),
        (lambda: SOFT(torch.zeros(6, 8)), r"x: got \[6, 8\], expected \[batch, tokens, 8\]"),
        (lambda: SOFT(X, torch.zeros(2, 4)), "query: got a tensor, expected None"),
        (lambda: QUERIED(X), r"query: got None, expected \[batch, 4\]"),
        (lambda: QUERIED(X, torch.zeros(2, 5)), r"query: got \[2, 5\], expected \[batch, 4\]"),
        (lambda: SOFT(X, mask=torch.ones(2, 6)), "dtype of mask: got torch.float32, expected bool"),
        (lambda: SOFT(X, mask=torch.ones(2, 1, 6, dtype=torch.bool)), r"mask: got \[2, 1, 6\], expected \[batch, 6\]"),
        (lambda: HardAttention(8, 7)(X), "number of tokens: got 6, expected at least k, 7"),
        (lambda: HardAttention(8, 2)(torch.zeros(2, 6, 9)), r"x: got \[2, 6, 9\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call()
