"""The embedded demo model: what it was shipped with still holds, and each of its attentions matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_deploy.demo import HELD_OUT, LABELS, SAMPLE_IMAGES, WEIGHTS, preprocess
from attn_deploy.demo.ablation import ABLATIONS, ablated, accuracy, held_out
from attn_deploy.demo.blocks import HardAttention, SelfAttention
from attn_deploy.demo.model import DemoNet, build
from attn_deploy.demo.train import load_split, model_inputs
from attn_deploy.parity import sqnr_db
from attn_deploy.preprocess import prepare

SAMPLES = sorted(SAMPLE_IMAGES.glob("*.png"))


@pytest.fixture(scope="module")
def model() -> DemoNet:
    return build()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return held_out()


@pytest.fixture(scope="module")
def logits(model: DemoNet, data: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(data[0])


def test_shipped_weights_read_the_held_out_digits(logits: Tensor, data: tuple[Tensor, Tensor]) -> None:
    assert logits.shape == (360, len(LABELS))
    assert accuracy(logits, data[1]) >= 0.985


def test_held_out_digits_are_the_fifth_that_training_leaves_aside(data: tuple[Tensor, Tensor]) -> None:
    train_pixels, held_pixels, _, labels = load_split()
    torch.testing.assert_close(data[0], model_inputs(held_pixels), rtol=0, atol=1e-6)
    assert torch.equal(data[1], labels)
    assert len(train_pixels) + len(held_pixels) == 1797


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("SE gate negated", 30),
        ("SE gate dropped", 2),
        ("CBAM channel gate dropped", 2),
        ("CBAM spatial gate dropped", 1),
        ("both CBAM gates dropped", 10),
        ("self-attention replaced by mean of V", 10),
        ("hard attention takes the lowest scores", 30),
    ],
)
def test_breaking_an_attention_costs_accuracy_and_moves_the_logits(
    model: DemoNet, data: tuple[Tensor, Tensor], logits: Tensor, name: str, points: int
) -> None:
    image, labels = data
    with torch.no_grad(), ablated(model, name):
        broken = model(image)
    assert sqnr_db(logits.numpy(), broken.numpy()) < 15
    assert accuracy(broken, labels) <= accuracy(logits, labels) - points / 100


def test_every_ablation_is_undone_when_it_ends(model: DemoNet, data: tuple[Tensor, Tensor], logits: Tensor) -> None:
    for name in ABLATIONS:
        with ablated(model, name):
            pass
    with torch.no_grad():
        assert torch.equal(model(data[0]), logits)


def test_zeroed_queries_make_self_attention_the_mean_of_the_values() -> None:
    torch.manual_seed(0)
    attention, tokens = SelfAttention(dim=12, heads=3), torch.randn(2, 5, 12)
    value = attention.qkv(tokens)[..., 24:]
    expected = attention.proj(value.mean(dim=1, keepdim=True).expand(-1, 5, -1))
    ((_, change),) = ABLATIONS["self-attention replaced by mean of V"]
    attention.qkv.register_forward_hook(lambda _module, _inputs, output: change(output))
    torch.testing.assert_close(attention(tokens), expected)


def test_hard_attention_weighs_only_the_best_tokens() -> None:
    torch.manual_seed(0)
    attention = HardAttention(dim=6, k=2).eval()
    tokens = torch.randn(1, 5, 6)
    score = attention.score(tokens)[0, :, 0]
    best = score.argsort(descending=True)[:2]
    expected = (score[best].softmax(0)[:, None] * tokens[0, best]).sum(0)
    torch.testing.assert_close(attention(tokens)[0], expected)


def test_hard_attention_in_training_teaches_tokens_it_did_not_choose() -> None:
    torch.manual_seed(0)
    attention = HardAttention(dim=6, k=2).train()
    scores = torch.randn(1, 5, requires_grad=True)
    tokens = torch.randn(1, 5, 6)
    attention._sampled(tokens, scores).square().sum().backward()
    assert scores.grad is not None
    assert (scores.grad != 0).all()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample_picture_is_read_through_the_preprocessing(model: DemoNet, path: Path) -> None:
    image = torch.from_numpy(prepare(path, preprocess()))
    with torch.no_grad():
        predicted = model(image[None]).argmax(1).item()
    assert LABELS[int(predicted)] == path.stem.split("_")[0]


def test_sample_pictures_are_held_out_digits_of_every_class(data: tuple[Tensor, Tensor]) -> None:
    assert {path.stem.split("_")[0] for path in SAMPLES} == set(LABELS)
    for path in SAMPLES:
        distance = (data[0] - torch.from_numpy(prepare(path, preprocess()))).abs().amax(dim=(1, 2, 3))
        assert distance.min() <= 1e-6, path
        assert LABELS[int(data[1][distance.argmin()])] == path.stem.split("_")[0]


def test_a_digit_at_its_original_8x8_pixels_is_read_too(model: DemoNet, data: tuple[Tensor, Tensor]) -> None:
    _, held_pixels, _, labels = load_split()
    grey = np.rint(held_pixels / 16 * 255).astype(np.uint8)
    image = torch.from_numpy(np.stack([prepare(digit, preprocess()) for digit in grey]))
    with torch.no_grad():
        assert accuracy(model(image), labels) >= 0.985


def test_exports_with_a_dynamic_batch(model: DemoNet, data: tuple[Tensor, Tensor], logits: Tensor) -> None:
    image = data[0]
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (image[:2],), dynamic_shapes={"image": {0: batch}}, strict=False)
    for size in (1, 3):
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(image[:size]), logits[:size], rtol=1e-4, atol=1e-4)


def test_shipped_files_stay_small() -> None:
    assert WEIGHTS.stat().st_size < 400_000
    assert HELD_OUT.stat().st_size < 400_000
    assert sum(path.stat().st_size for path in SAMPLES) < 20_000


def test_paths_and_preprocessing_need_no_torch() -> None:
    code = "import sys, attn_deploy.demo as d; d.preprocess(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
