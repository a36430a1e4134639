"""Tiny models of the packages with windows: all their attention stands in the natural order of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from attn_deploy.export.recognize.site import Kind
from attn_deploy.export.rewrite import RewrittenModel

Rewritten = Callable[..., RewrittenModel]


def timm_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,),
        num_classes=5,
    )  # fmt: skip


def torchvision_swin_v2() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=5,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip


def torchvision_maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        (32, 32), stem_channels=8, partition_size=4, block_channels=[16], block_layers=[1], head_dim=8,
        stochastic_depth_prob=0.0, num_classes=5,
    )  # fmt: skip


def transformers_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4, num_labels=5
    )
    model = transformers.SwinForImageClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):  # zero until it is trained
            nn.init.normal_(parameter)
    return model


PACKAGES: dict[Callable[[], nn.Module], tuple[str, str]] = {
    timm_swin: ("x", "PackedAttentionIndexedBias"),
    torchvision_swin_v2: ("x", "PackedAttentionIndexedCosineBias"),
    torchvision_maxvit: ("x", "PackedAttentionIndexedBias"),
    transformers_swin: ("pixel_values", "PackedAttentionIndexedBias"),
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make,
            id=make.__name__,
            marks=pytest.mark.slow if make in (torchvision_swin_v2, torchvision_maxvit) else (),
        )
        for make in PACKAGES
    ],
)
def test_models_of_the_packages_keep_the_natural_order(make: Callable[[], nn.Module], rewritten: Rewritten) -> None:
    torch.manual_seed(0)
    name, operator = PACKAGES[make]
    model = rewritten(make(), f"{name}=1x3x32x32", onnx=True)
    assert model.skipped == () or {s.kind for s in model.skipped} == {Kind.CHANNEL_GATE}
    windows = [s for s in model.sites if s.kind is Kind.WINDOW_ATTENTION]
    assert [s.operator for s in windows] == [operator] * 2
    assert not any(n.target is torch.ops.aten.roll.default for n in model.program.graph.nodes)
