"""Non-local block: each pixel gets a weighted mean of all pixels, as a residual."""

from __future__ import annotations

from torch import Tensor, nn

from attn_deploy.nn.checks import require_map, require_positive
from attn_deploy.nn.scaled_dot_product import attend


class NonLocalBlock(nn.Module):
    """x + BN(W_z y), with y = softmax(theta(x)^T phi(x)) g(x) over all pixels: the embedded Gaussian.

    Wang et al., "Non-local Neural Networks", CVPR 2018, equations 3 and 6: theta, phi and g are 1x1
    convolutions to `inner` channels, half of `channels` unless given, and the scores have no scale. Only theta has a
    bias: that of phi would add the same to all scores of a pixel, which softmax cancels, and those of g and W_z the
    same to all pixels of a channel, which the norm takes away. The BatchNorm's weight starts at zero, so that
    the block starts as the identity (section 4.1) and can be put into a trained network; what stands before it learns
    from the second step on.

    Raises ValueError when a size is not positive.
    """

    def __init__(self, channels: int, *, inner: int | None = None) -> None:
        super().__init__()
        inner = max(channels // 2, 1) if inner is None else inner
        require_positive(channels=channels, inner=inner)
        self.channels = channels
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1, bias=False)
        self.g = nn.Conv2d(channels, inner, 1, bias=False)
        self.output = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        require_map(x, self.channels)
        query, key, value = (_pixels(f(x)) for f in (self.theta, self.phi, self.g))
        mixed = attend(query, key, value, None, scale=1.0)  # [batch, 1, height * width, inner]
        mixed = mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.output(mixed))


def _pixels(x: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, 1, height * width, channels]: the tokens of a single head."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
