"""What attention a module computes, by its class: the expectation that recognition by dataflow is held against.

Nothing here looks at a captured graph. An attention is on windows when its tokens are a part of the image: one window
that holds the whole map is none. It is self-attention when queries and keys stand for the same tokens, and
cross-attention when they do not (class attention, queries of every second row, keys of a reduced map).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_deploy.export.recognize.site import Kind, Reason

SELF, CROSS, WINDOW = Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.WINDOW_ATTENTION


@dataclass(frozen=True)
class Expected:
    """One attention of a model's module tree; `skip` names the Reason when no operator of ours computes it."""

    kind: Kind
    module: str
    skip: str | None = None


Rule = Callable[[Any], Kind | tuple[Kind, ...]]

_SEGFORMER: Rule = lambda m: CROSS if m.sequence_reduction_ratio > 1 else SELF  # noqa: E731
_GLOBAL_CONTEXT: Rule = lambda m: tuple(  # noqa: E731
    kind for kind, part in ((Kind.CONTEXT_POOL, m.conv_attn), (Kind.CHANNEL_GATE, m.mlp_scale)) if part is not None
)
_MULTI_HEAD: Rule = lambda m: SELF if m.context_dim is None else CROSS  # noqa: E731

KINDS: dict[str, Kind | tuple[Kind, ...] | Rule] = {
    "attn_deploy.nn.cbam.ChannelAttention": Kind.CHANNEL_GATE,
    "attn_deploy.nn.cbam.SpatialAttention": Kind.SPATIAL_GATE,
    "attn_deploy.nn.coordinate.CoordinateAttention": Kind.SPATIAL_GATE,
    "attn_deploy.nn.efficient_channel.EfficientChannelAttention": Kind.CHANNEL_GATE,
    "attn_deploy.nn.hard_attention.HardAttention": Kind.HARD_ATTENTION,
    "attn_deploy.nn.multi_head.MultiHeadAttention": _MULTI_HEAD,
    "attn_deploy.nn.non_local.NonLocalBlock": SELF,
    "attn_deploy.nn.residual_attention.ResidualAttentionBlock": Kind.RESIDUAL_GATE,
    "attn_deploy.nn.scaled_dot_product.ScaledDotProductAttention": SELF,
    "attn_deploy.nn.soft_attention.SoftAttention": Kind.CONTEXT_POOL,
    "attn_deploy.nn.squeeze_excitation.SqueezeExcitation": Kind.CHANNEL_GATE,
    "timm.layers.attention.Attention": SELF,
    "timm.layers.bottleneck_attn.BottleneckAttn": SELF,
    "timm.layers.cbam.ChannelAttn": Kind.CHANNEL_GATE,
    "timm.layers.cbam.SpatialAttn": Kind.SPATIAL_GATE,
    "timm.layers.eca.EcaModule": Kind.CHANNEL_GATE,
    "timm.layers.global_context.GlobalContext": _GLOBAL_CONTEXT,
    "timm.layers.grn.GlobalResponseNorm": Kind.RESPONSE_NORM,
    "timm.layers.halo_attn.HaloAttn": WINDOW,
    "timm.layers.selective_kernel.SelectiveKernel": Kind.BRANCH_ATTENTION,
    "timm.layers.split_attn.SplitAttn": Kind.BRANCH_ATTENTION,
    "timm.layers.squeeze_excite.SEModule": Kind.CHANNEL_GATE,
    "timm.models._efficientnet_blocks.SqueezeExcite": Kind.CHANNEL_GATE,
    "timm.models.beit.Attention": SELF,
    "timm.models.cait.ClassAttn": CROSS,
    "timm.models.eva.EvaAttention": SELF,
    "timm.models.levit.Attention": SELF,
    "timm.models.levit.AttentionDownsample": CROSS,
    "timm.models.maxxvit.AttentionCl": WINDOW,
    "timm.models.mobilevit.LinearSelfAttention": Kind.CONTEXT_POOL,
    "timm.models.swin_transformer.WindowAttention": WINDOW,
    "timm.models.swin_transformer_v2.WindowAttention": WINDOW,
    "timm.models.xcit.XCA": Kind.CHANNEL_ATTENTION,
    "torch.nn.modules.activation.MultiheadAttention": SELF,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": WINDOW,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": WINDOW,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": WINDOW,
    "torchvision.ops.misc.SqueezeExcitation": Kind.CHANNEL_GATE,
    "transformers.models.bert.modeling_bert.BertSelfAttention": SELF,
    "transformers.models.clip.modeling_clip.CLIPAttention": SELF,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": SELF,
    "transformers.models.distilbert.modeling_distilbert.DistilBertSelfAttention": SELF,
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": SELF,
    "transformers.models.llama.modeling_llama.LlamaAttention": SELF,
    "transformers.models.segformer.modeling_segformer.SegformerAttention": _SEGFORMER,
    "transformers.models.swin.modeling_swin.SwinAttention": WINDOW,
    "transformers.models.t5.modeling_t5.T5Attention": SELF,
    "transformers.models.vit.modeling_vit.ViTAttention": SELF,
    "transformers.models.whisper.modeling_whisper.WhisperAttention": SELF,
}
"""Qualified class name -> the attention that its own forward computes (a part that is a module of its own has its own
line), or a function of the module where its options decide."""

SKIPPED = {
    "timm.models.cait.TalkingHeadAttn": (SELF, Reason.HEADS_MIXED),
    "transformers.models.clip.modeling_clip.CLIPTextModel": (Kind.HARD_ATTENTION, Reason.CHOSEN_BY_NUMBER),
}
"""Attention that no operator of ours computes, with the reason that recognition is to give. CLIP's text model takes the
token whose id is the end of the text."""

IN_WINDOWS = ("timm.models.mobilevit.MobileVitBlock",)
"""Modules that cut the image into parts before the self-attention below them."""


def _merged(module: Any, tokens: Tensor) -> int:
    """Tokens [batch * windows, ...] of one sample."""
    return tokens.shape[0]


def _cut_inside(module: Any, image: Tensor) -> int:
    """A map [batch, height, width, channels], padded and cut into windows by the module itself."""
    return math.prod(-(-size // window) for size, window in zip(image.shape[1:3], module.window_size, strict=True))


WINDOWS: dict[str, Callable[[Any, Tensor], int]] = {
    "timm.models.maxxvit.AttentionCl": _merged,
    "timm.models.swin_transformer.WindowAttention": _merged,
    "timm.models.swin_transformer_v2.WindowAttention": _merged,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": lambda m, tokens: tokens.shape[1],
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _cut_inside,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _cut_inside,
    "transformers.models.swin.modeling_swin.SwinAttention": _merged,
}
"""How many windows of one sample an attention is called with; a class that is not here has several in any case."""


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def expected_sites(model: nn.Module, example: Mapping[str, Tensor]) -> Iterator[Expected]:
    """The attention of a model, in the order of its module tree. `example` feeds one sample by argument name."""
    windows = _count_windows(model, example)
    parts = tuple(f"{path}." for path, module in model.named_modules() if class_name(module) in IN_WINDOWS)
    for path, module in model.named_modules():
        name = class_name(module)
        if name in SKIPPED:
            kind, reason = SKIPPED[name]
            yield Expected(kind, path, reason.name)
        rule = KINDS.get(name, ())
        found = rule if isinstance(rule, (Kind, tuple)) else rule(module)
        for kind in (found,) if isinstance(found, Kind) else found:
            if kind is WINDOW and windows.get(path) == 1:
                kind = SELF
            elif kind is SELF and path.startswith(parts):
                kind = WINDOW
            yield Expected(kind, path)


def _count_windows(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules():
        count = WINDOWS.get(class_name(module))
        if count is not None:

            def note(module: nn.Module, args: Any, path: str = path, count: Any = count) -> None:
                counts[path] = count(module, args[0])

            handles.append(module.register_forward_pre_hook(note))
    if handles:
        with torch.no_grad():
            model(**example)
    for handle in handles:
        handle.remove()
    return counts


def differences(expected: Counter[Expected], found: Counter[Expected]) -> tuple[str, ...]:
    """What is missing and what is too much, one line each, in the order of module paths."""
    lines = [("missing", item, count) for item, count in (expected - found).items()]
    lines += [("not expected", item, count) for item, count in (found - expected).items()]
    return tuple(
        f"{item.module}: {what}: {item.kind}"
        + (f", skipped: {item.skip}" if item.skip else "")
        + f" x{count}" * (count > 1)
        for what, item, count in sorted(lines, key=lambda line: (line[1].module, line[0]))
    )
