"""The models of the table, and a tiny variant of each spelling of attention for the fast tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models.byobnet import ByoBlockCfg

from attn_deploy.export.sources import LoadedSource, SourceRequest, load_source
from attn_deploy.export.sources.base import PACKAGE_DEFAULTS as PACKAGE_DEFAULTS
from attn_deploy.inputs import parse_input

FOLDER = Path(__file__).resolve().parents[1]
CONFIGS = "configs/"
INITIALIZER = "init:0"


@dataclass(frozen=True)
class Tiny:
    """Source arguments and inputs under which a model is small, with every kind of its attention left in."""

    arguments: Mapping[str, Any]
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class CoverageModel:
    """`source` as on the command line; an `hf:` source is a folder below tests/coverage/."""

    name: str
    source: str
    tiny: Tiny | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self, *, tiny: bool = False, weights: str = INITIALIZER) -> LoadedSource:
        """The model as the command line would load it."""
        small = self.tiny if tiny else None
        arguments = {**self.arguments, **(small.arguments if small else {})}
        inputs = tuple(parse_input(text) for text in (small.inputs if small else ()))
        source = self.source.replace(f"hf:{CONFIGS}", f"hf:{FOLDER / CONFIGS}/")
        return load_source(source, SourceRequest("", weights, arguments, inputs))


def _timm(name: str, inputs: tuple[str, ...] = (), **tiny: Any) -> CoverageModel:
    return CoverageModel(name, f"timm:{name}", Tiny(tiny, inputs) if tiny or inputs else None)


def _torchvision(name: str, inputs: tuple[str, ...] = (), **tiny: Any) -> CoverageModel:
    return CoverageModel(f"torchvision_{name}", f"torchvision:{name}", Tiny(tiny, inputs) if tiny or inputs else None)


def _hf(name: str, inputs: tuple[str, ...] = (), **tiny: Any) -> CoverageModel:
    return CoverageModel(f"hf_{name}", f"hf:{CONFIGS}{name}", Tiny(tiny, inputs) if tiny or inputs else None)


def _tokens(vocabulary: int, *, mask: bool = True, length: int = 16) -> tuple[str, ...]:
    ids = f"input_ids=1x{length}:int64:{vocabulary}"
    return (ids, f"attention_mask=1x{length}:int64") if mask else (ids,)


_SMALL_IMAGE = ("x=1x3x64x64",)


def _bottle(channels: int, s: int = 1) -> ByoBlockCfg:
    return ByoBlockCfg(type="bottle", d=1, c=channels, s=s, br=0.5)


_SELF_ATTN = ByoBlockCfg(type="self_attn", d=1, c=64, s=1, gs=0, br=0.5)
_MOBILEVIT = ByoBlockCfg(
    type="mobilevit", d=1, c=32, s=1, block_kwargs={"transformer_dim": 32, "transformer_depth": 1, "patch_size": 2}
)
_MOBILEVIT_V2 = ByoBlockCfg(
    type="mobilevit2", d=1, c=32, s=1, br=1.0, gs=1, block_kwargs={"transformer_depth": 1, "patch_size": 2}
)

MODELS = (
    _timm("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48),
    _timm("deit3_small_patch16_224"),
    _timm("beit_base_patch16_224", img_size=64, depth=1, embed_dim=48, num_heads=4),
    _timm("eva02_tiny_patch14_224", img_size=56, depth=1, embed_dim=48, num_heads=2),
    _timm("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 1), embed_dim=24, num_heads=(2, 4)),
    _timm("swinv2_tiny_window8_256", img_size=64, depths=(2, 1), embed_dim=24, num_heads=(2, 4)),
    _timm("maxvit_tiny_tf_224", img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=16),
    _timm("mobilevit_s", _SMALL_IMAGE, blocks=(_bottle(32, s=2), _MOBILEVIT), num_features=64),
    _timm("mobilevitv2_100", _SMALL_IMAGE, blocks=(_bottle(32, s=2), _MOBILEVIT_V2)),
    _timm("levit_128", img_size=64, embed_dim=(32, 48), num_heads=(2, 3), depth=(1, 1), key_dim=16),
    _timm("xcit_nano_12_p16_224", img_size=64, depth=1, embed_dim=48),
    _timm("cait_xxs24_224", img_size=64, depth=1, embed_dim=48),
    _timm("botnet26t_256", _SMALL_IMAGE, img_size=64, stem_chs=16, blocks=(_bottle(32), _SELF_ATTN)),
    _timm("halonet26t", _SMALL_IMAGE, stem_chs=16, blocks=(_bottle(32), _SELF_ATTN)),
    _timm("seresnet50", _SMALL_IMAGE, layers=(1, 1, 1, 1)),
    _timm("ecaresnet50t", _SMALL_IMAGE, layers=(1, 1, 1, 1)),
    _timm("gcresnet50t", _SMALL_IMAGE, stem_chs=16, blocks=(_bottle(32), _bottle(64, s=2))),
    _timm("skresnet34", _SMALL_IMAGE, layers=(1, 1, 1, 1)),
    _timm("resnest26d", _SMALL_IMAGE, layers=(1, 1, 1, 1)),
    CoverageModel(
        "resnet50_cbam", "attention_coverage.factories:resnet50_cbam", Tiny({"img_size": 64, "layers": (1, 1, 1, 1)})
    ),
    _timm("efficientnet_b0"),
    _timm("mobilenetv3_large_100"),
    _timm("ghostnet_100"),
    _timm("regnety_008"),
    _timm("convnextv2_atto", _SMALL_IMAGE, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
    _torchvision("vit_b_16"),
    _torchvision("swin_t"),
    _torchvision("swin_v2_t"),
    _torchvision("maxvit_t"),
    _hf("bert", _tokens(100), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100),
    _hf("distilbert"),
    _hf("vit"),
    _hf("swin", embed_dim=24, depths=[2, 1], num_heads=[2, 4], image_size=56),
    _hf("dinov2"),
    _hf("clip_vision"),
    _hf("clip_text", _tokens(100), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100),
    CoverageModel(
        "whisper_encoder", "attention_coverage.factories:whisper_encoder",
        Tiny({"d_model": 48, "encoder_layers": 1, "encoder_attention_heads": 3, "max_source_positions": 20}),
    ),
    _hf("t5_encoder", _tokens(100), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100),
    _hf("gpt2", _tokens(100), n_embd=64, n_layer=1, n_head=4, vocab_size=100),
    _hf("llama", _tokens(100), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100),
    _hf("segformer", depths=[1, 1, 1, 1], image_size=64, decoder_hidden_size=32),
    CoverageModel("nn_image_network", "attention_coverage.nn_networks:image_network"),
    CoverageModel("nn_token_network", "attention_coverage.nn_networks:token_network"),
)  # fmt: skip

BY_NAME = {model.name: model for model in MODELS}
