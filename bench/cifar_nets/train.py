"""Train one of the networks and write its weights and its record:

    ATTN_DEPLOY_DATA=... PYTHONPATH=bench python -m cifar_nets.train se|cbam|eca

Goes on from build/cifar_nets/NAME.pt, written after every epoch, when it was stopped; it is removed at the end. No
epoch or seed is picked by the test images: the last epoch's weights are the ones written. The same host and versions
make the same weights again. Products are in BF16 (1.6 times as fast as FP32 on a CPU that has it), weights in FP32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_deploy import environment
from attn_deploy.preprocess import read_preprocess
from cifar_nets import HERE, PREPROCESS, images, record_file, weights_file
from cifar_nets.network import ATTENTIONS, CifarNet

SEED = 0
EPOCHS = 12
BATCH = 128
MAX_LEARNING_RATE = 0.2
WEIGHT_DECAY = 5e-4
SMOOTHING = 0.1
SHIFT = 2
"""Pixels by which a training image moves at most; what moves in is its mirror image."""

PREPARED = read_preprocess(PREPROCESS)
THREADS = 1
CHECKPOINTS = HERE.parents[1] / "build" / "cifar_nets"

Turn = Callable[[], contextlib.AbstractContextManager[Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ATTENTIONS)
    name = parser.parse_args().name
    folder = os.environ.get("ATTN_DEPLOY_DATA")
    if not folder:
        print("ATTN_DEPLOY_DATA is not set: the images are not at hand", file=sys.stderr)
        return 6
    train(name, Path(folder))
    return 0


def train(name: str, data: Path, turn: Turn = contextlib.nullcontext) -> None:
    """Trains the network `name` and writes it. `turn` is entered around every step: whoever measures on the same host
    can hold training with it, and what it waits there is not counted as time of training."""
    from safetensors.torch import save

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(THREADS)  # the order of sums, and with it the weights, depends on their number
    torch.manual_seed(SEED)
    with turn():
        pixels, labels = (torch.from_numpy(array) for array in images.read(data, "train"))
        run = Run(CifarNet(name), len(pixels) // BATCH)
    checkpoint = CHECKPOINTS / f"{name}.pt"
    run.resume(checkpoint)
    padded = mirrored(pixels)
    while run.epoch < EPOCHS:
        loss = run.train_epoch(padded, labels, turn)
        run.save(checkpoint)
        print(f"{name}, epoch {run.epoch}: loss {loss:.3f}, {run.trained_s:.0f} s", flush=True)
    with turn():
        right, count = judge(run.network.eval(), *(torch.from_numpy(a) for a in images.read(data, "test")))
    weights_file(name).write_bytes(save(run.network.state_dict()))
    record_file(name).write_text(json.dumps(record(name, run, right, count), indent=2) + "\n")
    checkpoint.unlink()
    print(f"{name}: {right} of {count} test images", flush=True)


def record(name: str, run: Run, right: int, count: int) -> dict[str, Any]:
    """What was seen, and how it came about."""
    return {
        "command": f"PYTHONPATH=bench python -m cifar_nets.train {name}",
        "data": "CIFAR-10, compressed anew as JPEG: cifar10_train.zip and cifar10_test.zip of the data folder",
        "test_images": count,
        "test_correct": right,
        "test_accuracy_percent": 100 * right / count,
        "parameters": sum(p.numel() for p in run.network.parameters()),
        "epochs": run.epoch,
        "seed": SEED,
        "threads": THREADS,
        "trained_s": round(run.trained_s),
        "cpu_s": round(run.cpu_s),
        "cpu": environment.host()["cpu"],
        "torch": environment.versions()["torch"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass
class Run:
    """A network in training. `trained_s` is wall time inside steps, which grows with what else runs on the machine;
    `cpu_s` is what the processor spent on them, so what a core that does nothing else takes."""

    network: CifarNet
    steps_per_epoch: int
    epoch: int = 0
    trained_s: float = 0.0
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.generator = torch.Generator().manual_seed(SEED)
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=MAX_LEARNING_RATE, momentum=0.9, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, MAX_LEARNING_RATE, total_steps=EPOCHS * self.steps_per_epoch, pct_start=0.25
        )

    def train_epoch(self, padded: Tensor, labels: Tensor, turn: Turn) -> float:
        """One pass over the images, in an order of its own -> the mean loss."""
        self.network.train()
        order = torch.randperm(len(labels), generator=self.generator)[: self.steps_per_epoch * BATCH]
        total = 0.0
        for picked in order.split(BATCH):
            with turn():
                began_s, cpu_began_s = time.perf_counter(), time.process_time()
                total += self._step(normalized(augmented(padded[picked], self.generator)), labels[picked])
                self.trained_s += time.perf_counter() - began_s
                self.cpu_s += time.process_time() - cpu_began_s
        self.epoch += 1
        return total / self.steps_per_epoch

    def _step(self, image: Tensor, labels: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(image)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        state = {part: getattr(self, part).state_dict() for part in ("network", "optimizer", "schedule")}
        torch.save(
            {**state, "generator": self.generator.get_state(), "epoch": self.epoch, "trained_s": self.trained_s,
             "cpu_s": self.cpu_s}, written,
        )  # fmt: skip
        written.replace(path)

    def resume(self, path: Path) -> None:
        """As it stood after the last epoch that was saved, if any was."""
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        for part in ("network", "optimizer", "schedule"):
            getattr(self, part).load_state_dict(state[part])
        self.generator.set_state(state["generator"])
        self.epoch, self.trained_s, self.cpu_s = state["epoch"], state["trained_s"], state["cpu_s"]


def mirrored(pixels: Tensor) -> Tensor:
    """uint8 [images, side, side, 3] -> [images, side + 2 SHIFT, ..., 3], each image continued by its mirror image."""
    margin = (SHIFT, SHIFT)
    return torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), margin, margin, (0, 0)), mode="reflect"))


def augmented(padded: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of each mirrored image, anywhere in it, one in two flipped: uint8 [batch, side + 2 SHIFT, ..., 3] ->
    [batch, side, side, 3]."""
    count, side = len(padded), padded.shape[1] - 2 * SHIFT
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    along = torch.arange(side)
    rows, columns = top + along, left + torch.where(flipped, side - 1 - along, along)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalized(pixels: Tensor) -> Tensor:
    """uint8 [batch, height, width, 3] -> `image` float32 [batch, 3, height, width] as preprocess.json says, channels
    last in memory."""
    scaled = (pixels.float() * PREPARED.rescale - torch.tensor(PREPARED.mean)) / torch.tensor(PREPARED.std)
    return scaled.permute(0, 3, 1, 2)


@torch.inference_mode()
def judge(network: CifarNet, pixels: Tensor, labels: Tensor) -> tuple[int, int]:
    """How many images are classified as labelled, and how many there are."""
    parts = zip(pixels.split(500), labels.split(500), strict=True)
    right = sum(int((network(normalized(image)).argmax(1) == label).sum()) for image, label in parts)
    return right, len(labels)


if __name__ == "__main__":
    sys.exit(main())
