"""What each attention is worth: `python -m attn_deploy.demo.ablation` breaks them one by one on the held-out digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from attn_deploy.demo import HELD_OUT
from attn_deploy.demo.model import build
from attn_deploy.parity import sqnr_db


def _negated(output: Tensor) -> Tensor:
    return -output


def _zero_queries(qkv: Tensor) -> Tensor:
    """Equal scores everywhere, so that softmax(QK^T)V becomes the mean of V."""
    return torch.cat([torch.zeros_like(qkv[..., : qkv.shape[-1] // 3]), qkv[..., qkv.shape[-1] // 3 :]], dim=-1)


Change = Callable[[Tensor], Tensor]

ABLATIONS: dict[str, tuple[tuple[str, Change], ...]] = {
    "SE gate negated": (("se_block.gate", _negated),),
    "SE gate dropped": (("se_block.gate", torch.ones_like),),
    "CBAM channel gate dropped": (("cbam_block.channel_gate", torch.ones_like),),
    "CBAM spatial gate dropped": (("cbam_block.spatial_gate", torch.ones_like),),
    "both CBAM gates dropped": (
        ("cbam_block.channel_gate", torch.ones_like),
        ("cbam_block.spatial_gate", torch.ones_like),
    ),
    "self-attention replaced by mean of V": (("transformer.attention.qkv", _zero_queries),),
    "hard attention takes the lowest scores": (("hard_attention.score", _negated),),
}
"""What is broken -> the modules whose outputs are changed, and how."""


@contextmanager
def ablated(model: nn.Module, name: str) -> Iterator[None]:
    """The model with one of its attentions broken, until the context ends."""
    with ExitStack() as stack:
        for module, change in ABLATIONS[name]:
            stack.enter_context(model.get_submodule(module).register_forward_hook(_changing(change)))
        yield


def _changing(change: Change) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _module, _inputs, output: change(output)


def held_out() -> tuple[Tensor, Tensor]:
    """`image` float32 [samples, 1, 16, 16] and `labels` int64 [samples]."""
    with np.load(HELD_OUT) as data:
        return torch.from_numpy(data["image"]), torch.from_numpy(data["labels"])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def main() -> None:
    model = build()
    image, labels = held_out()
    logits = model(image)
    print(f"{'intact':40} {accuracy(logits, labels):7.2%}")
    for name in ABLATIONS:
        with ablated(model, name):
            changed = model(image)
        decibel = sqnr_db(logits.numpy(), changed.numpy())
        print(f"{name:40} {accuracy(changed, labels):7.2%}  SQNR {decibel:5.1f} dB")


if __name__ == "__main__":
    main()
