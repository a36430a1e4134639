"""Scaled dot-product and multi-head attention: their formula, masks, causality, groups, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_deploy.nn import MultiHeadAttention, RotaryPositionalEncoding, ScaledDotProductAttention


def written(
    query: Tensor, key: Tensor, value: Tensor, bias: float | np.ndarray = 0.0, scale: float | None = None
) -> np.ndarray:
    """softmax(scale * Q K^T + bias) V in NumPy, float64, one head at a time; heads of key and value are repeated."""
    q, k, v = (t.detach().numpy().astype(np.float64) for t in (query, key, value))
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    full = np.broadcast_to(bias, (*q.shape[:3], k.shape[2]))
    result = np.empty((*q.shape[:3], v.shape[3]))
    for batch, head in np.ndindex(q.shape[:2]):
        scores = scale * q[batch, head] @ k[batch, head // group].T + full[batch, head]
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        result[batch, head] = weights / weights.sum(axis=1, keepdims=True) @ v[batch, head // group]
    return result


def tensors(
    *, heads: int = 4, kv_heads: int = 4, query_len: int = 6, key_len: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, heads, query_len, 8), (2, kv_heads, key_len, 8), (2, kv_heads, key_len, 3))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


CAUSAL = np.where(np.tril(np.ones((6, 5))), 0.0, -np.inf)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_the_formula(kv_heads: int, scale: float | None, causal: bool) -> None:
    query, key, value = tensors(kv_heads=kv_heads)
    got = ScaledDotProductAttention(scale=scale, causal=causal)(query, key, value)
    expected = written(query, key, value, CAUSAL if causal else 0.0, scale)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (2, 1, 1, 5), (1, 4, 6, 5), (2, 4, 6, 5)])
def test_a_mask_is_added_or_hides(shape: tuple[int, ...], causal: bool) -> None:
    query, key, value = tensors()
    module = ScaledDotProductAttention(causal=causal)
    bias = torch.randn(shape, dtype=torch.float64)
    seen = torch.rand(shape) < 0.7
    seen[..., 0] = True  # every query may look somewhere
    order = CAUSAL if causal else np.zeros((6, 5))
    for mask, added in ((bias, bias.numpy()), (seen, np.where(seen.numpy(), 0.0, -np.inf))):
        expected = written(query, key, value, added + order)
        np.testing.assert_allclose(module(query, key, value, mask).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("additive", [False, True])
def test_a_hidden_key_has_no_influence_and_a_query_without_keys_gives_0(additive: bool) -> None:
    query, key, value = tensors()
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 3] = False
    mask[2] = False
    given = torch.zeros(6, 5, dtype=torch.float64).masked_fill(~mask, float("-inf")) if additive else mask
    module = ScaledDotProductAttention()
    before = module(query, key, value, given)
    key[:, :, 3], value[:, :, 3] = 1e3, -1e3
    assert torch.equal(module(query, key, value, given), before)
    assert (before[:, :, 2] == 0).all()
    query.requires_grad_()
    module(query, key, value, given).sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_projects_splits_attends_and_joins(kv_heads: int, bias: bool) -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 4, kv_heads=kv_heads, bias=bias).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    q, k, v = (
        part.reshape(2, 6, -1, 4).transpose(1, 2) for part in module.qkv(x).split([16, 4 * kv_heads, 4 * kv_heads], -1)
    )
    joined = written(q, k, v).transpose(0, 2, 1, 3).reshape(2, 6, 16)
    expected = joined @ module.output.weight.detach().numpy().T + (module.output.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_multi_head_attention_is_pytorch_s_own_with_its_weights() -> None:
    torch.manual_seed(0)
    peer = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    module = MultiHeadAttention(16, 4).double()
    renamed = {
        "qkv.weight": peer.in_proj_weight, "qkv.bias": peer.in_proj_bias,
        "output.weight": peer.out_proj.weight, "output.bias": peer.out_proj.bias,
    }  # fmt: skip
    module.load_state_dict(renamed)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected = peer(x, x, x, key_padding_mask=~padding)[0]
    torch.testing.assert_close(module(x, mask=padding[:, None, None, :]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rotary_turns_queries_and_keys_and_no_values(kv_heads: int) -> None:
    torch.manual_seed(0)
    rotary = RotaryPositionalEncoding(4, 8)
    module = MultiHeadAttention(16, 4, kv_heads=kv_heads, rotary=rotary).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    q, k, v = (
        p.unflatten(2, (-1, 4)).transpose(1, 2) for p in module.qkv(x).split([16, 4 * kv_heads, 4 * kv_heads], 2)
    )
    joined = torch.from_numpy(written(rotary(q), rotary(k), v)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.output(joined), rtol=1e-12, atol=1e-12)


def test_a_group_of_heads_equals_repeated_heads() -> None:
    """A grouped layer computes what a full one does whose key and value rows are repeated for each head of a group."""
    torch.manual_seed(0)
    grouped, full = MultiHeadAttention(16, 4, kv_heads=2).double(), MultiHeadAttention(16, 4).double()

    def repeated(packed: Tensor) -> Tensor:
        query, *others = packed.split([16, 8, 8])
        return torch.cat([query, *(o.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1) for o in others)])

    state = grouped.state_dict()
    full.load_state_dict({n: repeated(t) if n.startswith("qkv") else t for n, t in state.items()})
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rotary", [None, RotaryPositionalEncoding(4, 8)], ids=["plain", "rotary"])
def test_a_causal_token_sees_nothing_behind_itself(masked: bool, rotary: RotaryPositionalEncoding | None) -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 4, causal=True, rotary=rotary)
    mask = torch.ones(1, 6, dtype=torch.bool) if masked else None
    x = torch.randn(2, 6, 16)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = module(x, mask=mask), module(changed, mask=mask)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-6)
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-2


def test_cross_attention_reads_the_context_alone() -> None:
    """One token of context: each query gets its value, whatever the query says."""
    torch.manual_seed(0)
    module = MultiHeadAttention(16, 4, context_dim=12, kv_heads=2)
    context = torch.randn(2, 1, 12)
    heads = module.value(context).unflatten(2, (2, 4)).repeat_interleave(2, dim=2).flatten(2)
    expected = module.output(heads).expand(2, 6, 16)
    torch.testing.assert_close(module(torch.randn(2, 6, 16), context), expected)


def test_shapes_and_dtypes_are_kept() -> None:
    assert MultiHeadAttention(16, 4)(torch.randn(3, 7, 16)).shape == (3, 7, 16)
    half = MultiHeadAttention(16, 4, rotary=RotaryPositionalEncoding(4, 8)).to(torch.bfloat16)
    got = half(torch.randn(1, 7, 16, dtype=torch.bfloat16))
    assert (got.shape, got.dtype) == ((1, 7, 16), torch.bfloat16)
    query, key, value = tensors(query_len=9, key_len=2)
    assert ScaledDotProductAttention()(query, key, value).shape == (2, 4, 9, 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ScaledDotProductAttention(dropout=1.0), "dropout: got 1.0, expected a probability"),
        (lambda: ScaledDotProductAttention(scale=0.0), "scale: got 0.0, expected a positive factor"),
        (lambda: MultiHeadAttention(16, 3), "heads: got 3, expected a divisor of dim 16"),
        (lambda: MultiHeadAttention(16, 0), "heads: got 0, expected 1 or more"),
        (lambda: MultiHeadAttention(16, 4, kv_heads=3), "kv_heads: got 3, expected a divisor of heads 4"),
        (lambda: MultiHeadAttention(16, 4, dropout=-0.1), "dropout: got -0.1"),
        (lambda: MultiHeadAttention(16, 4, context_dim=0), "context_dim: got 0, expected 1 or more"),
        (lambda: MultiHeadAttention(16, 4, context_dim=8, causal=True), "causal: got True, expected False"),
        (lambda: MultiHeadAttention(16, 4, rotary=RotaryPositionalEncoding(8, 9)), "rotary: got 8, expected 4"),
        (lambda: MultiHeadAttention(16, 4, context_dim=8, rotary=RotaryPositionalEncoding(4, 9)), "rotary: got"),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_refused(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        make()


SELF, CROSS, X = MultiHeadAttention(16, 4), MultiHeadAttention(16, 4, context_dim=12), torch.zeros(2, 6, 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SELF(torch.zeros(6, 16)), r"x: got \[6, 16\], expected \[batch, tokens, 16\]"),
        (lambda: SELF(torch.zeros(2, 6, 8)), r"x: got \[2, 6, 8\]"),
        (lambda: SELF(X, X), "context: got a tensor, expected None"),
        (lambda: CROSS(X), r"context: got None, expected \[batch, context_tokens, 12\]"),
        (lambda: CROSS(X, X), r"context: got \[2, 6, 16\]"),
        (lambda: SELF(X, mask=torch.ones(2, 6, 6)[:, :, :5]), r"shape of mask: got \[2, 6, 5\]"),
        (lambda: SELF(X, mask=torch.ones(6, 5)), r"shape of mask: got \[6, 5\].*key_len 6"),
        (lambda: SELF(X, mask=torch.ones(2, 3, 6, 6)), r"shape of mask: got \[2, 3, 6, 6\].*4 heads"),
        (lambda: SELF(X, mask=torch.ones(6, 6, dtype=torch.int64)), "dtype of mask: got torch.int64, expected bool or"),
        (lambda: ScaledDotProductAttention()(X, X, X), r"query: got \[2, 6, 16\]"),
        (
            lambda: ScaledDotProductAttention()(*(torch.zeros(2, heads, 6, 8) for heads in (4, 3, 3))),
            "heads of key and value: got 3, expected a divisor of the 4",
        ),
        (
            lambda: ScaledDotProductAttention()(*(torch.zeros(2, heads, 6, 8) for heads in (4, 4, 2))),
            "heads of value: got 2, expected 4",
        ),
    ],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_refused(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call()
