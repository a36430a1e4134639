"""Three small CNNs with labels: one residual trunk with squeeze-and-excitation (`se`), with CBAM (`cbam`) and with
efficient channel attention (`eca`), which we trained ourselves on CIFAR-10, so that INT8 of gated CNNs can be judged in
points of accuracy. They are for tests and benchmarks and are not part of the package.

The images are those of the data folder, `cifar10_train.zip` and `cifar10_test.zip`: CIFAR-10 (A. Krizhevsky, "Learning
Multiple Layers of Features from Tiny Images", 2009), compressed anew as JPEG, on which nets lose 1 to 2 points against
the original pixels. `PYTHONPATH=bench python -m cifar_nets.train NAME` trains one and writes beside this file
`NAME.safetensors` and `NAME.json`: the accuracy that was seen on all 10,000 test images, and how it was trained.

As a source: `PYTHONPATH=bench attn-deploy export cifar_nets.network:se --preprocess bench/cifar_nets/preprocess.json`.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
PREPROCESS = HERE / "preprocess.json"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In alphabetical order, as the folders of the archives."""


def weights_file(name: str) -> Path:
    return HERE / f"{name}.safetensors"


def record_file(name: str) -> Path:
    return HERE / f"{name}.json"
