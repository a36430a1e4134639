"""The text after `--data` -> Dataset."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from attn_deploy.data.dataset import Dataset, Source
from attn_deploy.data.function import SampleFunction
from attn_deploy.data.images import SUFFIXES, ImageFolder
from attn_deploy.data.npz import NpzFile
from attn_deploy.errors import UsageError
from attn_deploy.preprocess import Preprocess, nearest_file
from attn_deploy.session import TensorSpec

FORMS = "a folder of images, an .npz file, or package.module:function"
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def open_data(
    spec: str | os.PathLike[str],
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess | None,
    labels: Sequence[str] | None,
) -> Dataset:
    """The data that `spec` names, for a model with these inputs, whose first dimension is the batch.

    Raises UsageError for whatever can be known to be wrong without reading the samples. A path that exists goes
    before a function of the same spelling.
    """
    text = os.fspath(spec)
    for tensor in inputs:
        if not tensor.shape:
            raise UsageError(
                f"input {tensor.name!r} has no batch dimension, so it cannot be fed sample by sample",
                got=tensor.describe(),
                expected=f"{tensor.name}: {tensor.dtype}[batch, ...]",
            )
    return Dataset(_open_source(text, inputs, preprocess, labels))


def _open_source(
    text: str, inputs: Sequence[TensorSpec], preprocess: Preprocess | None, labels: Sequence[str] | None
) -> Source:
    path = Path(text)
    if path.is_dir():
        return ImageFolder(path, inputs=inputs, preprocess=preprocess, labels=labels)
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return NpzFile(path, inputs=inputs, labels=labels)
        next_step = None
        if path.suffix.lower() in SUFFIXES:
            next_step = f"give the folder that holds it: {path.parent}"
        elif path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz"):
            next_step = "unpack it and give the folder"
        raise UsageError(
            "this file is not data", where=text, got=path.suffix or path.name, expected=FORMS, next_step=next_step
        )
    if FUNCTION.fullmatch(text):
        return SampleFunction(text, inputs=inputs, labels=labels)
    raise UsageError("there is no such data", where=text, got=text, expected=FORMS, next_step=nearest_file(path))
