"""Train DemoNet and write its weights, held-out data and sample pictures: `python -m attn_deploy.demo.train`.

The data is scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set: 1,797 digits of 8x8
pixels, 0 to 16. No epoch or seed is picked by the held-out fifth: the last epoch's weights are the ones written.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attn_deploy.demo import HELD_OUT, SAMPLE_IMAGES, WEIGHTS, preprocess
from attn_deploy.demo.model import DemoNet
from attn_deploy.preprocess import prepare_batch

SEED = 0
EPOCHS = 60
BATCH = 64
GATE_COST = 0.1
"""Loss for a gate that stands open everywhere. Without it the spatial gate stays near 0.9, and dropping it leaves the
logits at 38 dB and the accuracy as it was; with it, at 10 dB."""

PICTURE_SCALE = 8
"""A sample picture shows each digit's pixel as 8x8 pixels, so that a person can see it."""


def picture(pixels: npt.NDArray[np.float64]) -> Image.Image:
    """Pixels 0..16 [8, 8] -> 8-bit grey picture of 64x64."""
    grey = np.rint(pixels / 16 * 255).astype(np.uint8)
    return Image.fromarray(np.kron(grey, np.ones((PICTURE_SCALE, PICTURE_SCALE), np.uint8)))


def load_split() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Tensor, Tensor]:
    """Training and held-out pixels [samples, 8, 8], then their labels; a stratified fifth is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, held, train_labels, held_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=SEED
    )
    return train, held, torch.from_numpy(train_labels), torch.from_numpy(held_labels)


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 10 %, move by up to 1.6 of 16 pixels. [batch, 1, 16, 16] in and out.

    One in four images stays as it is, since that is what the network meets in use.
    """
    batch = image.shape[0]
    draw = (2 * torch.rand(4, batch, generator=generator) - 1) * (torch.rand(batch, generator=generator) > 0.25)
    angle, scale = draw[0] * math.radians(12), 1 + 0.1 * draw[1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, 0.2 * draw[2], sin, cos, 0.2 * draw[3]], dim=1).reshape(batch, 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    black = -preprocess().mean[0] / preprocess().std[0]  # what moves in from outside; grid_sample fills with 0
    return F.grid_sample(image - black, grid, align_corners=False) + black


def model_inputs(pixels: npt.NDArray[np.float64]) -> Tensor:
    """[samples, 8, 8] -> `image` [samples, 1, 16, 16], by the very code that prepares a user's picture."""
    return torch.from_numpy(prepare_batch([picture(digit) for digit in pixels], preprocess()))


def train(image: Tensor, labels: Tensor) -> DemoNet:
    """`image` [samples, 1, 16, 16] and `labels` [samples] -> the trained network in eval mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = DemoNet()
    gates: list[Tensor] = []
    for gate in (model.se_block.gate, model.cbam_block.channel_gate, model.cbam_block.spatial_gate):
        gate.register_forward_hook(lambda _module, _inputs, output: gates.append(output.mean()))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(image) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(image), generator=generator)[: len(image) // BATCH * BATCH]
        for picked in order.split(BATCH):
            gates.clear()
            logits = model(augment(image[picked], generator))
            loss = F.cross_entropy(logits, labels[picked], label_smoothing=0.05) + GATE_COST * sum(gates)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: loss {total / (len(image) // BATCH):.4f}", flush=True)
    return model.eval()


def write_samples(folder: Path, pixels: npt.NDArray[np.float64], labels: Tensor) -> None:
    """The first held-out digit of each class, as `{label}_0.png`."""
    folder.mkdir(exist_ok=True)
    for label in range(10):
        first = int((labels == label).nonzero()[0])
        picture(pixels[first]).save(folder / f"{label}_0.png", optimize=True)


def main() -> None:
    from safetensors.torch import save

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of sums, and with it the weights, then does not depend on the core count
    started = time.perf_counter()
    train_pixels, held_pixels, train_labels, held_labels = load_split()
    image, held_image = model_inputs(train_pixels), model_inputs(held_pixels)
    grey = image * preprocess().std[0] + preprocess().mean[0]
    print(f"{len(image)} training digits, grey mean {grey.mean():.3f} std {grey.std():.3f}; {len(held_image)} held out")
    model = train(image, train_labels)
    WEIGHTS.write_bytes(save(model.state_dict()))
    np.savez_compressed(HELD_OUT, image=held_image.numpy(), labels=held_labels.numpy())
    write_samples(SAMPLE_IMAGES, held_pixels, held_labels)
    with torch.no_grad():
        right = (model(held_image).argmax(1) == held_labels).sum().item()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"held-out accuracy {right / len(held_labels):.2%} ({right}/{len(held_labels)}), {parameters} parameters")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
