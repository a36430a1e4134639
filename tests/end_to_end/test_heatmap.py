"""inspect --heatmap: a picture per site, of the weights that PyTorch has too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attn_deploy.demo as demo
from attn_deploy import heatmap as module_under_test
from attn_deploy.demo.model import build
from attn_deploy.preprocess import prepare
from attn_deploy.weight_map import Layout, WeightMap, weight_map

Cli = Callable[..., Any]
SAMPLE = min(demo.SAMPLE_IMAGES.glob("*.png"))
VIT = ("timm:vit_tiny_patch16_224", "--source-arg", "img_size=64", "--source-arg", "depth=2", "--weights", "init:0")


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[WeightMap]:
    """The numbers that are drawn, as they pass by."""
    seen: list[WeightMap] = []

    def noted(*args: Any) -> WeightMap:
        seen.append(weight_map(*args))
        return seen[-1]

    monkeypatch.setattr(module_under_test, "weight_map", noted)
    return seen


def test_the_demo_s_pictures_show_the_weights_of_pytorch(
    demo_bundle: Path, attn_deploy_cli: Cli, tmp_path: Path, maps: list[WeightMap]
) -> None:
    ran = attn_deploy_cli("inspect", demo_bundle, "--heatmap", SAMPLE, "--out", tmp_path / "maps", "--json")
    assert ran.code == 0, ran.out
    written = [Path(h["file"]).name for h in ran.json["heatmaps"]]
    assert written[:4] == ["se_block.png", "cbam_block.png", "cbam_block-2.png", "transformer.attention.png"]
    assert sorted(written) == sorted(p.name for p in (tmp_path / "maps").iterdir())
    for name in written:
        with Image.open(tmp_path / "maps" / name) as picture:
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 3
    assert [m.layout for m in maps[:4]] == [Layout.BARS, Layout.BARS, Layout.IMAGE, Layout.IMAGE]

    model, seen = build(), {}
    network = model.eval()
    network.transformer.attention.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o))
    network.se_block.gate.register_forward_hook(lambda m, i, o: seen.update(gate=o))
    with torch.no_grad():
        network(torch.from_numpy(prepare(SAMPLE, demo.preprocess()))[None])
    heads = network.transformer.attention.heads
    query, key, _ = seen["qkv"].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    np.testing.assert_allclose(maps[3].values.ravel(), weights[0].mean((0, 1)).numpy(), rtol=1e-4)
    np.testing.assert_allclose(maps[0].values, seen["gate"].flatten().numpy(), rtol=1e-4)


def test_a_source_is_drawn_with_its_own_preprocessing_and_by_its_class_token(
    attn_deploy_cli: Cli, tmp_path: Path, maps: list[WeightMap]
) -> None:
    ran = attn_deploy_cli("inspect", *VIT, "--heatmap", SAMPLE, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks.0.attn.png", "blocks.1.attn.png"]
    assert [m.values.shape for m in maps] == [(4, 4), (4, 4)]
    assert "blocks.1.attn.png: weight received from the class token" in ran.out
    assert not np.allclose(maps[0].values, maps[1].values)


def test_pictures_are_not_written_over(demo_bundle: Path, attn_deploy_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cbam_block.png").write_bytes(b"mine")
    ran = attn_deploy_cli("inspect", demo_bundle, "--heatmap", SAMPLE, "--out", tmp_path)
    assert ran.code == 2
    assert "cbam_block.png" in ran.err
    assert "--out" in ran.err
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"mine"]


def broken_image(folder: Path) -> Path:
    (folder / "broken.png").write_bytes(SAMPLE.read_bytes()[:40])
    return folder / "broken.png"


@pytest.mark.parametrize(
    ("item", "image", "said"),
    [
        ("demo", broken_image, "the image cannot be decoded"),
        ("demo", lambda folder: folder / "gone.png", "there is no such image"),
        ("transformers_in_miniature:plain", lambda _: SAMPLE, "--heatmap needs a model whose images"),
    ],
)
def test_what_cannot_be_drawn_is_told_and_nothing_is_written(
    item: str, image: Callable[[Path], Path], said: str, attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    ran = attn_deploy_cli("inspect", item, "--heatmap", image(tmp_path), "--out", tmp_path / "maps")
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "maps").exists()
