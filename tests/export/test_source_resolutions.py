"""One source in several resolutions: the same weights in each, position tables resampled by the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attn_deploy.errors import UsageError
from attn_deploy.export.sources import LoadedSource, SourceRequest, load_resolutions, load_source
from attn_deploy.export.sources.base import PACKAGE_DEFAULTS
from attn_deploy.inputs import ExampleInput
from attn_deploy.preprocess import Preprocess

VIT = ("timm:vit_tiny_patch16_224", {"depth": 1, "num_classes": 3})
SWIN = ("timm:swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 3})


def load(text: str, arguments: dict[str, Any], *sides: int, weights: str | None = None) -> list[LoadedSource]:
    sizes = {f"{side}x{side}": (ExampleInput("x", (1, 3, side, side)),) for side in sides}
    sources = load_resolutions(text, SourceRequest("", weights, arguments), sizes)
    assert list(sources) == list(sizes)
    return list(sources.values())


def module(source: LoadedSource) -> nn.Module:
    assert isinstance(source.module, nn.Module)
    assert not source.module.training
    return source.module


def run(source: LoadedSource) -> Tensor:
    with torch.no_grad():
        found = module(source)(torch.ones(*source.inputs[0].shape))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("weights", [None, "init:7", PACKAGE_DEFAULTS])
def test_untrained_weights_are_the_same_at_every_size(weights: str | None) -> None:
    first, second = load(*SWIN, 56, 64, weights=weights)
    states = module(first).state_dict(), module(second).state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first.weights == second.weights
    assert [run(source).shape for source in (first, second)] == [(1, 3), (1, 3)]
    assert [source.inputs[0].shape[2:] for source in (first, second)] == [(56, 56), (64, 64)]


@pytest.mark.parametrize(("text", "arguments", "table"), [(*VIT, "pos_embed"), (*SWIN, "bias_table")])
def test_tables_of_another_size_are_resampled_and_all_else_is_kept(
    text: str, arguments: dict[str, Any], table: str
) -> None:
    first, second = load(text, arguments, 64, 32)
    before, after = module(first).state_dict(), module(second).state_dict()
    resampled = [name for name in before if before[name].shape != after[name].shape]
    assert resampled
    assert all(name.endswith(table) for name in resampled)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in resampled)
    for name in resampled:  # smoothed, and of the same kind: neither zero nor drawn anew
        assert 0.2 < float(after[name].std() / before[name].std()) < 1.5


def test_a_file_of_weights_is_resampled_for_each_size_from_the_file(tmp_path: Path) -> None:
    (trained,) = load(*VIT, 64)
    state = module(trained).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    small, same = load(*VIT, 32, 64, weights=str(tmp_path / "vit.safetensors"))
    assert all(torch.equal(state[name], value) for name, value in module(same).state_dict().items())
    assert module(small).state_dict()["pos_embed"].shape == (1, 5, 192)
    assert small.weights == same.weights == "vit.safetensors"


def test_images_are_prepared_for_each_size_as_timm_does() -> None:
    crops = [(s.preprocess.crop, s.preprocess.resize) for s in load(*VIT, 64, 160) if s.preprocess is not None]
    assert crops == [((64, 64), int(64 / 0.9)), ((160, 160), int(160 / 0.9))]


def test_one_input_of_another_size_builds_the_model_for_it() -> None:
    source = load_source(SWIN[0], SourceRequest("", PACKAGE_DEFAULTS, SWIN[1], (ExampleInput("x", (1, 3, 64, 32)),)))
    assert run(source).shape == (1, 3)


def test_a_model_that_takes_every_size_is_built_once() -> None:
    first, second = load("timm:resnet18", {"num_classes": 3}, 32, 64, weights=PACKAGE_DEFAULTS)
    assert first.module is second.module


def test_a_size_that_the_user_gave_by_name_is_not_changed() -> None:
    first, second = load(VIT[0], {**VIT[1], "img_size": 32}, 32, 64, weights=PACKAGE_DEFAULTS)
    assert first.module is second.module
    with pytest.raises(AssertionError, match="64"):
        run(second)


def test_an_input_that_the_model_lacks_is_told_with_its_graph() -> None:
    sizes = {"32x32": (ExampleInput("x", (1, 3, 32, 32)),), "64x64": (ExampleInput("y", (1, 3, 64, 64)),)}
    with pytest.raises(UsageError, match="no argument 'y'") as caught:
        load_resolutions(VIT[0], SourceRequest("", PACKAGE_DEFAULTS, VIT[1]), sizes)
    assert caught.value.where == "graph 64x64"


class Pooled(nn.Module):
    """Weights that are drawn anew by every call of the factory."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.mean((2, 3)))


def pooled() -> Any:
    return Pooled(), {"image": torch.zeros(1, 3, 8, 8)}


def test_a_factory_is_called_once_so_that_its_weights_are_shared() -> None:
    sizes = {"8x8": (ExampleInput("image", (1, 3, 8, 8)),), "9x9": (ExampleInput("image", (1, 3, 9, 9)),)}
    first, second = load_resolutions(f"{__name__}:pooled", SourceRequest(""), sizes).values()
    assert first.module is second.module
    assert second.inputs[0].shape == (1, 3, 9, 9)


def test_another_source_s_preparation_of_images_is_scaled() -> None:
    config = Preprocess("image", (8, 8), resize=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = LoadedSource("net", "net", Pooled().eval(), (ExampleInput("image", (1, 3, 8, 8)),), "", config)
    scaled = source.at((ExampleInput("image", (1, 3, 16, 16)),)).preprocess
    assert scaled is not None
    assert (scaled.crop, scaled.resize) == ((16, 16), 20)
