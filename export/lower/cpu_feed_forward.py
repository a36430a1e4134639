"""Feed-forward blocks: norm, linear layer, activation, linear layer and the sum with what the norm read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_deploy.export.lower.cpu_fuser import Fuser
from attn_deploy.export.lower.cpu_linear import LinearLayer, in_8_bits, only_reader
from attn_deploy.ops.feed_forward import FORM_ACTIVATIONS
from attn_deploy.ops.quantized_feed_forward import groups_of


@dataclass(frozen=True)
class FeedForward:
    first: LinearLayer
    second: LinearLayer

    @property
    def form(self) -> str:
        """The operator that holds all of it; empty where only one of the layers is in 8 bits, or its hidden layer has
        no groups of a good size."""
        form = "FeedForward" + self.first.activation
        if not self.first.quantized and not self.second.quantized:
            return form
        both = self.first.quantized and self.second.quantized
        return in_8_bits(form) if both and groups_of(self.first.shape[1]) is not None else ""


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
    attributes: dict[str, float | int] = {"epsilon": first.norm.epsilon}
    if first.quantized:
        groups = groups_of(first.shape[1])
        assert groups is not None
        attributes["groups"] = groups
    fuser.make(block.form, inputs, attributes, named=first.product, last=second.nodes[-1])
