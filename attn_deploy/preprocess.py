"""Image -> model input, as the manifest says. Pillow decodes and resizes, NumPy does the rest.

The numbers are those of the stacks models are trained with: torchvision's Resize, CenterCrop, ToTensor and Normalize
on PIL images, and timm's evaluation transform built from them. Like theirs, an EXIF orientation is not applied.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from attn_deploy.errors import UsageError
from attn_deploy.target import nearest

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4, "YCbCr": 3, "HSV": 3, "CMYK": 4}
"""Modes of Pillow with one byte per channel, and how many channels each has."""
FITS = ("exact", "cover", "contain")

MAX_RESIZED_PIXELS = 1 << 27
"""A 1 x 65000 strip resized to a short side of 248 would be 4 billion pixels; no photograph comes near this bound."""


class PreprocessError(UsageError, ValueError):
    """A preprocess description contradicts itself. Also a ValueError, so that msgspec names the field's path."""


class UnreadableImageError(UsageError):
    """One image cannot be decoded or resized; the next one may be fine."""


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes the model's input of [channels, height, width] float32.

    The image is decoded as `mode`, its short side resized to `resize` (or both sides when it is a pair (height,
    width)), centre-cropped to `crop` (height, width), multiplied by `rescale`, then (x - mean) / std per channel.
    `resize` None leaves the size as it is. `input` is the name of the graph input it feeds.

    `fit` says how a pair is meant: `exact` sets both sides (timm's crop_mode squash), `cover` and `contain` keep the
    aspect ratio and make the image just cover the pair (timm's centre crop of a model that is not square) or just lie
    inside it (timm's crop_mode border). Where the image is smaller than the crop, `fill` surrounds it: one value, or
    one per channel, of 0 to 255.
    """

    input: str
    crop: tuple[int, int]
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bicubic"
    mode: str = "RGB"
    rescale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    fit: str = "exact"
    fill: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for field, value, known in (
            ("mode", self.mode, CHANNELS),
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("fit", self.fit, FITS),
        ):
            if value not in known:
                raise PreprocessError(f"unknown `{field}` in preprocess", got=value, expected=", ".join(known))
        sizes = (*self.crop, *(self.resize if isinstance(self.resize, tuple) else (self.resize or 1,)))
        if min(sizes) < 1 or self.resize == 0:
            raise PreprocessError(
                "`crop` and `resize` in preprocess are sizes in pixels",
                got=f"crop {self.crop}, resize {self.resize}",
                expected="1 or more",
            )
        channels = CHANNELS[self.mode]
        for field, count, allowed in (
            ("mean", len(self.mean), (channels,)),
            ("std", len(self.std), (channels,)),
            ("fill", len(self.fill), (1, channels)),
        ):
            if count not in allowed:
                raise PreprocessError(
                    f"`{field}` in preprocess does not have one value per channel",
                    got=count,
                    expected=f"{channels}, the channels of mode {self.mode}",
                )
        if not self.rescale > 0 or not min(self.std) > 0:
            raise PreprocessError(
                "`rescale` and `std` in preprocess are divided by", got=(self.rescale, self.std), expected="above 0"
            )
        if not 0 <= min(self.fill) <= max(self.fill) <= 255:
            raise PreprocessError("`fill` in preprocess is a pixel value", got=self.fill, expected="0 to 255")


def read_preprocess(path: str | os.PathLike[str]) -> Preprocess:
    """The description in a JSON file. Raises UsageError naming the file, the field and the keys that exist."""
    keys = ", ".join(Preprocess.__struct_fields__)
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Preprocess)
    except OSError as error:
        raise UsageError(
            "the --preprocess file cannot be read", where=str(path), got=error.strerror, next_step=nearest_file(path)
        ) from error
    except msgspec.DecodeError as error:
        cause = error.__cause__
        if isinstance(cause, PreprocessError):
            raise PreprocessError(cause.what, got=cause.got, expected=cause.expected, where=str(path)) from error
        raise UsageError(
            "the --preprocess file does not describe a preprocess",
            where=str(path),
            got=error,
            expected=f"a JSON object with the keys {keys}",
            next_step="`input` and `crop` are required, the others have defaults",
        ) from error


def validate_preprocess(config: Preprocess, channels: int | str, height: int | str, width: int | str) -> None:
    """Raises UsageError when `config` cannot make an input of [channels, height, width]; a named size takes any."""
    made = (CHANNELS[config.mode], *config.crop)
    wanted = (channels, height, width)
    for axis, got, expected in zip(("channels", "height", "width"), made, wanted, strict=True):
        if isinstance(expected, int) and got != expected:
            field = f"mode {config.mode}" if axis == "channels" else f"crop {list(config.crop)}"
            raise UsageError(
                f"the preprocess makes another {axis} than input {config.input!r} takes",
                got=f"{got} ({field})",
                expected=f"{expected}, of [channels, height, width] {list(wanted)}",
                next_step="change `mode` and `mean`" if axis == "channels" else f"set `crop` to {[height, width]}",
            )


def at_size(config: Preprocess, height: int, width: int) -> Preprocess:
    """The same preparation for an input of another size: `resize` keeps its ratio to the crop."""
    ratios = (height / config.crop[0], width / config.crop[1])
    resize = config.resize
    if isinstance(resize, int):
        resize = round(resize * min(height, width) / min(config.crop))
    elif resize is not None:
        resize = (round(resize[0] * ratios[0]), round(resize[1] * ratios[1]))
    return msgspec.structs.replace(config, crop=(height, width), resize=resize)


def is_image_like(value: object) -> bool:
    """Whether `load_image` takes this kind of value, or each item of a list or tuple; files are not looked at."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_image_like(item) and not isinstance(item, list | tuple) for item in value)
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8 and (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3))
    return isinstance(value, str | os.PathLike | bytes) or _is_pil(value)


def load_image(image: object) -> Image.Image:
    """A path, encoded bytes, PIL image or uint8 array [height, width, 3] or [height, width] as a decoded PIL image.

    Raises UnreadableImageError (a UsageError) with the file name for a file that is not there or cannot be decoded.
    """
    from PIL import Image

    if isinstance(image, np.ndarray) and is_image_like(image) and image.size:
        return Image.fromarray(image)
    if isinstance(image, str | os.PathLike | bytes | Image.Image):
        where = _image_name(image)
        try:
            if isinstance(image, Image.Image):
                image.load()
                return image
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                opened.load()
                return opened
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever a damaged file makes them trip over
            missing = isinstance(error, FileNotFoundError) and not isinstance(image, bytes | Image.Image)
            raise UnreadableImageError(
                "there is no such image" if missing else "the image cannot be decoded",
                where=where,
                got=f"{type(error).__name__}: {error}",
                expected="an image file that Pillow reads",
                next_step=nearest_file(where) if missing else None,
            ) from error
    got = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UsageError(
        "this is not an image",
        got=got,
        expected="a path, encoded bytes, a PIL image, or a uint8 array [height, width, 3] or [height, width]",
    )


def prepare(image: object, config: Preprocess) -> Array:
    """One image, as `load_image` takes it -> float32 [channels, height, width].

    Raises UnreadableImageError when it cannot be decoded, converted to `config.mode` or resized.
    """
    from PIL import Image

    decoded = load_image(image)
    try:
        converted = decoded.convert(config.mode)
    except (ValueError, OSError) as error:
        raise UnreadableImageError(
            f"the image cannot be converted to {config.mode}", where=_image_name(image), got=f"mode {decoded.mode}"
        ) from error
    width, height = converted.size
    new_height, new_width = _resized(height, width, config)
    if not 0 < new_height * new_width <= MAX_RESIZED_PIXELS:
        raise UnreadableImageError(
            "the image is too elongated to be resized",
            where=_image_name(image),
            got=f"{height} x {width} (height x width), resized {new_height} x {new_width}",
            expected=f"1 to {MAX_RESIZED_PIXELS} pixels after resizing",
        )
    resample = Image.Resampling[config.interpolation.upper()]
    resized = converted.resize((new_width, new_height), resample)
    crop_height, crop_width = config.crop
    fill = config.fill * (CHANNELS[config.mode] // len(config.fill))
    canvas = Image.new(config.mode, (crop_width, crop_height), fill if len(fill) > 1 else fill[0])
    canvas.paste(resized, (-_crop_offset(new_width, crop_width), -_crop_offset(new_height, crop_height)))
    return _normalized(np.asarray(canvas), config)


def prepare_batch(images: Sequence[object], config: Preprocess) -> Array:
    """Images, as `load_image` takes them -> float32 [batch, channels, height, width]."""
    batch = np.empty((len(images), CHANNELS[config.mode], *config.crop), np.float32)
    for index, image in enumerate(images):
        batch[index] = prepare(image, config)
    return batch


def _resized(height: int, width: int, config: Preprocess) -> tuple[int, int]:
    """(height, width) after resizing: int() of the long side as torchvision's Resize, round() as timm's."""
    if config.resize is None:
        return height, width
    if isinstance(config.resize, int):
        long_side = int(config.resize * max(height, width) / min(height, width))
        return (long_side, config.resize) if width <= height else (config.resize, long_side)
    if config.fit == "exact":
        return config.resize
    ratios = (height / config.resize[0], width / config.resize[1])
    ratio = min(ratios) if config.fit == "cover" else max(ratios)
    return round(height / ratio), round(width / ratio)


def _crop_offset(size: int, crop: int) -> int:
    """First pixel of the crop along one side; negative where the image is padded. torchvision's two roundings."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2.0)


def _normalized(pixels: Array, config: Preprocess) -> Array:
    """uint8 [height, width, channels] or [height, width] -> float32 [channels, height, width]."""
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    values = planes.astype(np.float32, order="C")
    # Dividing by 255 and multiplying by 1/255 differ in the last bit; ToTensor divides.
    values /= np.float32(1.0 / config.rescale)
    values -= np.asarray(config.mean, np.float32)[:, None, None]
    values /= np.asarray(config.std, np.float32)[:, None, None]
    return values


def _is_pil(value: object) -> bool:
    """Without importing Pillow: where nobody has imported it, nothing is a PIL image."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _image_name(image: object) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    return str(getattr(image, "filename", "") or f"an image given as {type(image).__name__}")


def nearest_file(path: str | os.PathLike[str]) -> str:
    """What to do about a path that is not there: the nearest names in the deepest folder of it that exists."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = os.listdir(missing.parent)
    except OSError as error:
        return f"{missing.parent} cannot be listed: {error.strerror}"
    hint = nearest(missing.name, names) if names else "it is empty"
    return f"in {missing.parent.resolve()}: {hint}"
