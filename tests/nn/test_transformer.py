"""Transformer layers: PyTorch's own with the same weights, pre- and post-norm, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attn_deploy.nn import RotaryPositionalEncoding, TransformerDecoderLayer, TransformerEncoderLayer


def distinct(module: nn.Module) -> nn.Module:
    """Biases and norms that PyTorch starts at 0 and 1 are drawn, so that mixing them up shows."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
        assert parameter.unique().numel() > 1, name
    return module.double().eval()


def named(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of PyTorch's parts by the names that ours have."""
    return {f"{name}.{n}": t for name, part in parts.items() for n, t in part.state_dict().items()}


def self_attention(peer: nn.Module) -> dict[str, Tensor]:
    packed = {f"self_attention.qkv.{n}": peer.state_dict()[f"self_attn.in_proj_{n}"] for n in ("weight", "bias")}
    return packed | named({"self_attention.output": peer.self_attn.out_proj})


def cross_attention(peer: nn.Module) -> dict[str, Tensor]:
    """PyTorch's keys have a bias and ours have none: the comparison shows that it is not missed."""
    attention = peer.multihead_attn
    state = named({"cross_attention.output": attention.out_proj})
    for i, name in enumerate(("query", "key", "value")):
        state[f"cross_attention.{name}.weight"] = attention.in_proj_weight.chunk(3)[i]
        if name != "key":
            state[f"cross_attention.{name}.bias"] = attention.in_proj_bias.chunk(3)[i]
    return state


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_is_pytorch_s_own_with_its_weights(pre_norm: bool, activation: str) -> None:
    torch.manual_seed(0)
    peer = distinct(nn.TransformerEncoderLayer(16, 4, 24, activation=activation, batch_first=True, norm_first=pre_norm))
    module = TransformerEncoderLayer(16, 4, 24, pre_norm=pre_norm, activation=activation).double()
    others = {"feed_forward.0": peer.linear1, "feed_forward.3": peer.linear2}
    norms = {"self_attention_norm": peer.norm1, "feed_forward_norm": peer.norm2}
    module.load_state_dict(self_attention(peer) | named(others | norms))
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected = peer(x, src_key_padding_mask=~padding)
    got = module(x, mask=padding[:, None, None, :])
    torch.testing.assert_close(got[padding], expected[padding], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_decoder_layer_is_pytorch_s_own_with_its_weights(pre_norm: bool) -> None:
    torch.manual_seed(0)
    peer = distinct(nn.TransformerDecoderLayer(16, 4, 24, activation="relu", batch_first=True, norm_first=pre_norm))
    module = TransformerDecoderLayer(16, 4, 24, pre_norm=pre_norm, activation="relu").double()
    others = {"feed_forward.0": peer.linear1, "feed_forward.3": peer.linear2}
    norms = {"self_attention_norm": peer.norm1, "cross_attention_norm": peer.norm2, "feed_forward_norm": peer.norm3}
    module.load_state_dict(self_attention(peer) | cross_attention(peer) | named(others | norms))
    x, context = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    padding = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = peer(x, context, tgt_mask=hidden, memory_key_padding_mask=~padding)
    got = module(x, context, context_mask=padding[:, None, None, :])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_decoder_writes_one_token_after_the_other() -> None:
    """The outputs of a prefix are those of the prefix alone."""
    torch.manual_seed(0)
    module = TransformerDecoderLayer(
        16, 4, 24, context_dim=12, kv_heads=2, rotary=RotaryPositionalEncoding(4, 8)
    ).eval()
    x, context = torch.randn(2, 6, 16), torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x, context)[:, :4], module(x[:, :4], context))


def test_an_encoder_layer_without_positions_does_not_know_the_order_and_with_rotary_it_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    plain, rotary = (
        TransformerEncoderLayer(16, 4, 24, rotary=r).eval() for r in (None, RotaryPositionalEncoding(4, 8))
    )
    torch.testing.assert_close(plain(x.flip(1)).flip(1), plain(x))
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    assert (rotary(x[:, order]) - rotary(x)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TransformerEncoderLayer(16, 4, 24, activation="tanh"), "activation: got 'tanh', expected relu or"),
        (lambda: TransformerEncoderLayer(16, 4, 0), "hidden: got 0"),
        (lambda: TransformerDecoderLayer(16, 5, 24), "heads: got 5"),
        (lambda: TransformerDecoderLayer(16, 4, 24, dropout=1.5), "dropout: got 1.5"),
        (lambda: TransformerEncoderLayer(16, 4, 24)(torch.zeros(6, 16)), r"x: got \[6, 16\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        make()
