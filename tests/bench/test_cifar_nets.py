"""The CNNs that were trained on CIFAR-10: what is shipped holds together, and training does what it says."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_nets import PREPROCESS, record_file, train, weights_file
from cifar_nets.network import ATTENTIONS, STAGES, CifarNet, build
from cifar_nets.network import cbam as cbam_source

from attn_deploy.export.capture import capture
from attn_deploy.export.recognize import recognize
from attn_deploy.export.sources import SourceRequest, load_source
from attn_deploy.preprocess import prepare, read_preprocess
from attn_deploy.session import DimBounds

BLOCKS = sum(count for _, count in STAGES)

TRAINED = all(weights_file(name).is_file() and record_file(name).is_file() for name in ATTENTIONS)
trained = pytest.mark.skipif(not TRAINED, reason="the nets are not trained yet: python -m cifar_nets.train NAME")


@trained
@pytest.mark.parametrize("name", ATTENTIONS)
def test_weights_are_small_and_stand_beside_an_accuracy_of_85_percent_on_all_test_images(name: str) -> None:
    record = json.loads(record_file(name).read_text())
    assert weights_file(name).stat().st_size < 3_000_000
    assert record["test_images"] == 10_000
    assert record["test_accuracy_percent"] == record["test_correct"] / 100 >= 85
    assert record["cpu_s"] <= 3600  # on one thread: what a core that does nothing else takes
    assert record["parameters"] == sum(p.numel() for p in build(name).parameters())


@trained
@pytest.mark.parametrize(("name", "sites"), [("se", BLOCKS), ("eca", BLOCKS), ("cbam", 2 * BLOCKS)])
def test_every_attention_of_the_trunk_is_recognized(name: str, sites: int) -> None:
    source = load_source(f"cifar_nets.network:{name}", SourceRequest(""))
    found = recognize(capture(source, {"batch": DimBounds()}))
    assert len(found.sites) == sites
    assert found.skipped == []


@trained
def test_a_source_is_fed_the_images_that_its_preprocessing_makes() -> None:
    network, example = cbam_source()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    prepared = torch.from_numpy(prepare(pixels, read_preprocess(PREPROCESS)))
    torch.testing.assert_close(train.normalized(torch.from_numpy(pixels)[None])[0], prepared)
    assert example.keys() == {read_preprocess(PREPROCESS).input}
    assert network(prepared[None]).shape == (1, 10)


def test_a_training_image_is_a_crop_of_the_mirrored_image_or_its_flip() -> None:
    images = torch.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3).to(torch.uint8)
    padded = train.mirrored(images)
    side = padded.shape[1] - 2 * train.SHIFT
    crops = {
        tuple(crop.flatten().tolist()): (top, left, flipped)
        for top in range(2 * train.SHIFT + 1)
        for left in range(2 * train.SHIFT + 1)
        for flipped in (False, True)
        for crop in [_crop(padded[1], top, left, side, flipped)]
    }
    drawn = train.augmented(padded[1:].expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    seen = {crops[tuple(image.flatten().tolist())] for image in drawn}
    assert seen == set(crops.values())
    assert torch.equal(_crop(padded[1], train.SHIFT, train.SHIFT, side, False), images[1])


def _crop(padded: torch.Tensor, top: int, left: int, side: int, flipped: bool) -> torch.Tensor:
    crop = padded[top : top + side, left : left + side]
    return crop.flip(1) if flipped else crop


def test_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    steps = 2
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (steps * train.BATCH, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(pixels),), generator=generator)
    padded = train.mirrored(pixels)
    whole, before, after = (_started(steps) for _ in range(3))
    for _ in range(2):
        whole.train_epoch(padded, labels, nullcontext)
    before.train_epoch(padded, labels, nullcontext)
    before.save(tmp_path / "eca.pt")
    after.resume(tmp_path / "eca.pt")
    after.train_epoch(padded, labels, nullcontext)
    assert after.epoch == whole.epoch == 2
    assert not torch.equal(_weights(before), _weights(whole))
    assert torch.equal(_weights(after), _weights(whole))


def _started(steps: int) -> train.Run:
    torch.manual_seed(train.SEED)
    return train.Run(CifarNet("eca"), steps)


def _weights(run: train.Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.network.parameters()])
