"""Attentions of convolutional networks against their formulas in NumPy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_deploy.nn import (
    CBAM,
    ChannelAttention,
    CoordinateAttention,
    EfficientChannelAttention,
    NonLocalBlock,
    ResidualAttentionBlock,
    SpatialAttention,
    SqueezeExcitation,
)

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def weights(module: nn.Module) -> dict[str, Array]:
    return {name: t.detach().numpy() for name, t in module.state_dict().items()}


def pointwise(w: dict[str, Array], name: str, x: Array) -> Array:
    """A 1x1 convolution of x [batch, channels, ...]."""
    y = np.einsum("oc,bc...->bo...", w[f"{name}.weight"][:, :, 0, 0], x)
    bias = w.get(f"{name}.bias")
    return y if bias is None else y + bias.reshape(1, -1, *(1,) * (x.ndim - 2))


def normed(w: dict[str, Array], name: str, x: Array) -> Array:
    """BatchNorm in evaluation mode."""
    shape = (1, -1, 1, 1)
    gain = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + 1e-5)
    return (x - w[f"{name}.running_mean"].reshape(shape)) * gain.reshape(shape) + w[f"{name}.bias"].reshape(shape)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 16, 6, 5, dtype=torch.float64)


def prepared(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with parameters and norm statistics that all matter."""
    torch.manual_seed(1)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.5)
    return module.double().eval()


def compare(module: nn.Module, x: Tensor, expected: Array) -> None:
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def channel_gate(w: dict[str, Array], x: Array) -> Array:
    def mlp(pooled: Array) -> Array:
        return pointwise(w, "mlp.2", np.maximum(pointwise(w, "mlp.0", pooled), 0))

    return sigmoid(mlp(x.mean((2, 3))) + mlp(x.max((2, 3))))[:, :, None, None]


def spatial_gate(w: dict[str, Array], x: Array) -> Array:
    """The convolution written as a sum over its window."""
    pooled = np.stack([x.mean(1), x.max(1)], axis=1)
    kernel = w["conv.weight"][0]
    size = kernel.shape[-1]
    padded = np.pad(pooled, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return sigmoid(np.einsum("bchwij,cij->bhw", windows, kernel) + w["conv.bias"])[:, None]


def test_squeeze_and_excitation(x: Tensor) -> None:
    module = prepared(SqueezeExcitation(16, reduction=4))
    w, n = weights(module), x.numpy()
    hidden = np.maximum(pointwise(w, "squeeze", n.mean((2, 3))), 0)
    compare(module, x, n * sigmoid(pointwise(w, "expand", hidden))[:, :, None, None])


def test_channel_attention(x: Tensor) -> None:
    module = prepared(ChannelAttention(16, reduction=4))
    compare(module, x, x.numpy() * channel_gate(weights(module), x.numpy()))


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_spatial_attention(x: Tensor, kernel_size: int) -> None:
    module = prepared(SpatialAttention(kernel_size=kernel_size))
    compare(module, x, x.numpy() * spatial_gate(weights(module), x.numpy()))


def test_cbam_is_channel_then_spatial_attention(x: Tensor) -> None:
    module = prepared(CBAM(16, reduction=4))
    once = x.numpy() * channel_gate(weights(module.channel_attention), x.numpy())
    compare(module, x, once * spatial_gate(weights(module.spatial_attention), once))


@pytest.mark.parametrize(("channels", "size"), [(2, 1), (16, 3), (64, 3), (256, 5), (512, 5)])
def test_the_kernel_of_efficient_channel_attention_grows_with_the_channels(channels: int, size: int) -> None:
    assert EfficientChannelAttention(channels).conv.kernel_size == (size,)


def test_efficient_channel_attention(x: Tensor) -> None:
    module = prepared(EfficientChannelAttention(16, kernel_size=5))
    kernel = weights(module)["conv.weight"].ravel()
    padded = np.pad(x.numpy().mean((2, 3)), ((0, 0), (2, 2)))
    scores = sum(kernel[i] * padded[:, i : i + 16] for i in range(5))
    compare(module, x, x.numpy() * sigmoid(scores)[:, :, None, None])


def test_coordinate_attention(x: Tensor) -> None:
    module = prepared(CoordinateAttention(16, reduction=2))
    w, n = weights(module), x.numpy()
    joined = np.concatenate([n.mean(3), n.mean(2)], axis=2)[..., None]
    hidden = normed(w, "norm", pointwise(w, "shared", joined))
    hidden = hidden * np.clip(hidden + 3, 0, 6) / 6
    rows = sigmoid(pointwise(w, "rows", hidden[:, :, :6]))  # [batch, channels, height, 1]
    columns = sigmoid(pointwise(w, "columns", hidden[:, :, 6:])).transpose(0, 1, 3, 2)
    compare(module, x, n * rows * columns)


def test_non_local_block(x: Tensor) -> None:
    module = prepared(NonLocalBlock(16))
    w, n = weights(module), x.numpy()
    theta, phi, g = (pointwise(w, name, n).reshape(2, 8, 30) for name in ("theta", "phi", "g"))
    scores = np.exp(np.einsum("bci,bcj->bij", theta, phi))
    y = np.einsum("bij,bcj->bci", scores / scores.sum(2, keepdims=True), g).reshape(2, 8, 6, 5)
    compare(module, x, n + normed(w, "norm", pointwise(w, "output", y)))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5)])
def test_residual_attention_is_one_plus_the_mask_times_the_trunk(height: int, width: int) -> None:
    module = prepared(ResidualAttentionBlock(16, depth=2))
    seen: dict[str, Tensor] = {}
    for name in ("pre", "trunk", "mask"):
        getattr(module, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    got = module(torch.randn(2, 16, height, width, dtype=torch.float64))
    mask, trunk = seen["mask"].detach(), seen["trunk"].detach()
    np.testing.assert_allclose(got.detach().numpy(), (1 + mask.numpy()) * trunk.numpy(), rtol=1e-12)
    assert mask.shape == trunk.shape == got.shape
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask.std() > 0.05
    torch.testing.assert_close(trunk, module.trunk(seen["pre"]))


def test_the_mask_of_residual_attention_sees_farther_with_depth() -> None:
    """How far a change of one pixel reaches in the mask, in a block without trunk units that mix pixels."""

    def reach(depth: int) -> int:
        module = prepared(ResidualAttentionBlock(8, pre_units=0, depth=depth))
        x = torch.zeros(1, 8, 64, 64, dtype=torch.float64)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(module.mask(x)[0, :, 32, 32].sum(), x)
        return int((gradient.abs().sum((0, 1, 2)) > 0).sum())

    assert reach(1) < reach(2) < reach(3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SqueezeExcitation(8), "reduction: got 16, expected at most the 8 channels"),
        (lambda: SqueezeExcitation(0), "channels: got 0"),
        (lambda: CBAM(16, reduction=0), "reduction: got 0"),
        (lambda: SpatialAttention(kernel_size=4), "kernel_size: got 4, expected a positive odd number"),
        (lambda: EfficientChannelAttention(8, kernel_size=2), "kernel_size: got 2"),
        (lambda: CoordinateAttention(8, reduction=0), "reduction: got 0"),
        (lambda: NonLocalBlock(8, inner=0), "inner: got 0"),
        (lambda: ResidualAttentionBlock(6), "channels: got 6, expected a multiple of 4"),
        (lambda: ResidualAttentionBlock(8, depth=0), "depth: got 0"),
        (lambda: ResidualAttentionBlock(8, pre_units=-1), "pre_units: got -1, expected 0 or more"),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_refused(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "module",
    [
        SqueezeExcitation(16), ChannelAttention(16), CBAM(16), EfficientChannelAttention(16), CoordinateAttention(16),
        NonLocalBlock(16), ResidualAttentionBlock(16), SpatialAttention(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"feature map: got \[16, 6, 5\], expected \[batch, (16|channels), height"):
        module(torch.zeros(16, 6, 5))
    if not isinstance(module, SpatialAttention):
        with pytest.raises(
            ValueError, match=r"feature map: got \[2, 12, 6, 5\], expected \[batch, 16, height, width\]"
        ):
            module(torch.zeros(2, 12, 6, 5))
