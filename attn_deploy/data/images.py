"""Folders of images: one subfolder per class, or flat and unlabelled."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from attn_deploy.data.sample import Sample, SampleChecker, Unreadable
from attn_deploy.errors import UsageError
from attn_deploy.preprocess import Preprocess, UnreadableImageError, prepare, validate_preprocess
from attn_deploy.session import TensorSpec
from attn_deploy.target import nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's list and .gif; a file of another kind is no sample. Upper case counts as well."""


class ImageFolder:
    """Images below `root`, keyed by their path relative to it with '/'. Hidden names and other files do not count."""

    def __init__(
        self,
        root: Path,
        *,
        inputs: Sequence[TensorSpec],
        preprocess: Preprocess | None,
        labels: Sequence[str] | None,
    ) -> None:
        self._root = root
        self._preprocess = _usable_preprocess(root, inputs, preprocess)
        classes = {name: images for name in _folders(root) if (images := _images(root / name))}
        flat = _images(root)
        if not classes and not flat:
            _raise_empty(root)
        if classes and flat:
            raise UsageError(
                "images lie both in class folders and beside them",
                where=str(root),
                got=f"{len(flat)} images ({flat[0]}, ...) beside {len(classes)} folders ({next(iter(classes))}, ...)",
                expected="one subfolder per class, or images without subfolders",
            )
        self.labelled = bool(classes)
        self._labels: dict[str, int | None] = dict.fromkeys(flat)
        if classes:
            index_of = _class_indices(root, list(classes), SampleChecker(inputs, labels), labels)
            self._labels = {f"{name}/{image}": index_of[name] for name in classes for image in classes[name]}
        kind = f"{len(classes)} class folders" if classes else "no class folders"
        self.description = f"{len(self._labels)} images in {root} ({kind})"

    def keys(self) -> list[str]:
        return list(self._labels)

    def samples(self, wanted: Iterable[str]) -> Iterator[Sample | Unreadable]:
        """The wanted images in the order asked for, each decoded when its turn comes."""
        for key in wanted:
            try:
                pixels = prepare(self._root / key, self._preprocess)
            except UnreadableImageError as error:
                yield Unreadable(key, f"{error.what}: {error.got}")
            else:
                yield Sample(key, {self._preprocess.input: pixels}, self._labels[key])


def _usable_preprocess(root: Path, inputs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Preprocess:
    """`preprocess`, once it is sure that it makes the model's only input."""
    described = "; ".join(spec.describe() for spec in inputs)
    others = "give an .npz whose keys are the input names, or package.module:function"
    if len(inputs) != 1:
        raise UsageError(
            "images feed one input only",
            where=str(root),
            got=f"{len(inputs)} inputs: {described}",
            expected="a model with one image input",
            next_step=others,
        )
    if preprocess is None:
        raise UsageError(
            "images were given for a model whose preprocess is not known",
            where=str(root),
            expected=described,
            next_step="say how an image becomes that input with --preprocess FILE.json, or " + others,
        )
    spec = inputs[0]
    if preprocess.input != spec.name:
        raise UsageError(
            "the preprocess feeds an input that the model does not have",
            got=preprocess.input,
            expected=spec.name,
            next_step=f"set `input` to {spec.name!r}",
        )
    if len(spec.shape) != 4 or spec.dtype != "float32":
        raise UsageError(
            "the model's input is not an image",
            got=described,
            expected=f"{spec.name}: float32[batch, channels, height, width]",
            next_step=others,
        )
    validate_preprocess(preprocess, *spec.shape[1:])
    return preprocess


def _class_indices(
    root: Path, names: list[str], checker: SampleChecker, labels: Sequence[str] | None
) -> dict[str, int]:
    """Class index by folder name: names of the label list where all folders are such, else digits are indices."""
    known = list(labels or ())
    all_named = set(names) <= set(known)
    indices: dict[str, int] = {}
    for name in names:
        if name.isascii() and name.isdigit() and not all_named:
            indices[name] = checker.check_label(int(name), f"class folder {name} of {root}")
        elif known.count(name) == 1:
            indices[name] = known.index(name)
        elif name in known:
            raise UsageError(
                "a class folder's name stands more than once in the label list",
                where=str(root / name),
                got=name,
                expected="a name that stands once",
                next_step="name the folder by one of the indices "
                + ", ".join(str(index) for index, label in enumerate(known) if label == name),
            )
        else:
            raise UsageError(
                "a class folder is neither a class index nor a name of the label list",
                where=str(root / name),
                got=name,
                expected="an index such as 0001" + ("" if known else " (the model comes without a label list)"),
                next_step=nearest(name, known) if known else "rename the folder to its class index",
            )
    return indices


def _raise_empty(root: Path) -> None:
    deeper = [f"{name}/{inner}" for name in _folders(root) for inner in _folders(root / name)]
    holding = next((path for path in deeper if _images(root / path)), None)
    raise UsageError(
        "the folder holds no images",
        where=str(root),
        got=", ".join(sorted(os.listdir(root))[:8]) or "an empty folder",
        expected=f"images ({' '.join(SUFFIXES)}) in one subfolder per class, or without subfolders",
        next_step=None if holding is None else f"images lie deeper: pass {(root / holding).parent}",
    )


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower().endswith(SUFFIXES) and entry.is_file()
        )
