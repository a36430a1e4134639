"""Feed-forward blocks: norm, linear layer, activation, linear layer and the sum with what the norm read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_deploy.export.lower.cpu_fuser import Fuser
from attn_deploy.export.lower.cpu_linear import LinearLayer, only_reader
from attn_deploy.ops.feed_forward import FORM_ACTIVATIONS


@dataclass(frozen=True)
class FeedForward:
    first: LinearLayer
    second: LinearLayer

    @property
    def form(self) -> str:
        return "FeedForward" + self.first.activation


def feed_forwards(layers: Sequence[LinearLayer]) -> list[FeedForward]:
    """The pairs among `layers` that make one."""
    by_operand = {layer.x: layer for layer in layers}
    found = []
    for first in layers:
        second = by_operand.get(first.result)
        if second is not None and _fits(first, second):
            found.append(FeedForward(first, second))
    return found


def _fits(first: LinearLayer, second: LinearLayer) -> bool:
    return (
        first.norm is not None
        and first.residual is None
        and first.activation in FORM_ACTIVATIONS
        and only_reader(first.result) is second.product
        and second.norm is None
        and not second.activation
        and second.residual is first.norm.x
    )


def fuse_feed_forward(fuser: Fuser, block: FeedForward) -> None:
    first, second = block.first, block.second
    assert first.norm is not None
    inputs = [first.norm.x, *fuser.norm_constants(first.norm)]
    inputs += fuser.layer_constants(first) + fuser.layer_constants(second)
    attributes = {"epsilon": first.norm.epsilon}
    fuser.make(block.form, inputs, attributes, named=first.product, last=second.nodes[-1])
