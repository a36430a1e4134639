"""The images of the data folder: as arrays to train and judge on, as a folder for `--data`."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cifar_nets import CLASSES

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def archive(data: Path, part: str) -> Path:
    """`part` is `train` or `test`."""
    return data / f"cifar10_{part}.zip"


def read(data: Path, part: str) -> tuple[Pixels, Labels]:
    """Pixels uint8 [images, 32, 32, 3] and class indices [images], in the order of the names in the archive."""
    pixels, labels = [], []
    for name, encoded in _files(archive(data, part)):
        with Image.open(io.BytesIO(encoded)) as image:
            pixels.append(np.asarray(image.convert("RGB")))
        labels.append(CLASSES.index(name.split("/")[1]))
    return np.stack(pixels), np.asarray(labels)


def unpack(data: Path, part: str, folder: Path) -> Path:
    """The archive's files below `folder`, which is returned: one subfolder per class, named by its index."""
    for index in range(len(CLASSES)):
        (folder / str(index)).mkdir(parents=True, exist_ok=True)
    for name, encoded in _files(archive(data, part)):
        _, label, file = name.split("/")
        (folder / str(CLASSES.index(label)) / file).write_bytes(encoded)
    return folder


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as opened:
        for name in sorted(opened.namelist()):
            if name.endswith(".jpg"):
                yield name, opened.read(name)
