"""Heat maps, bars and tables of numbers as pictures, beside the image they belong to. Pillow draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]

LEAST_SIDE = 224
"""Smaller images are drawn larger, pixel by pixel."""

OVERLAY = 0.65
"""Share of the colour over the image in grey."""

MARGIN, LINE = 8, 14
BARS_HEIGHT = 160


def colours(values: Array) -> Array:
    """[..., ] in 0..1 -> uint8 [..., 3]: black, red, yellow, white, each channel rising over a third."""
    level = np.clip(np.nan_to_num(values.astype(np.float64)), 0.0, 1.0)[..., None] * 3.0
    return np.rint(255.0 * np.clip(level - np.array([0.0, 1.0, 2.0]), 0.0, 1.0)).astype(np.uint8)


def normalized(values: Array) -> Array:
    """0..1 between the least and the largest value; all 0 where they are equal."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values, dtype=np.float64)


def heat_over_image(image: Array, values: Array, caption: Sequence[str]) -> Image.Image:
    """image uint8 [height, width, 3], values [rows, columns] over the whole of it -> the image, and it under the map.

    A value covers its cell of the image evenly: nothing is smoothed."""
    from PIL import Image

    factor = max(1, math.ceil(LEAST_SIDE / min(image.shape[:2])))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    plain = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
    heat = Image.fromarray(colours(normalized(values))).resize(size, Image.Resampling.NEAREST)
    grey = plain.convert("L").convert("RGB")
    return _captioned([plain, Image.blend(grey, heat, OVERLAY)], caption)


def heat_table(values: Array, caption: Sequence[str]) -> Image.Image:
    """values [rows, columns], each a square."""
    from PIL import Image

    cell = max(1, min(16, 2 * LEAST_SIDE // max(values.shape)))
    size = (values.shape[1] * cell, values.shape[0] * cell)
    return _captioned([Image.fromarray(colours(normalized(values))).resize(size, Image.Resampling.NEAREST)], caption)


def bars(values: Array, caption: Sequence[str]) -> Image.Image:
    """values [count] as bars from 0, in their order."""
    from PIL import Image, ImageDraw

    step = max(2, min(24, 2 * LEAST_SIDE // len(values)))
    canvas = Image.new("RGB", (step * len(values), BARS_HEIGHT), "white")
    pen = ImageDraw.Draw(canvas)
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = (BARS_HEIGHT - 1) / ((high - low) or 1.0)
    for number, value in enumerate(values):
        top, bottom = sorted((high - float(value), high))
        box = (number * step, round(top * scale), number * step + max(1, step - 2), round(bottom * scale))
        pen.rectangle(box, fill=(176, 32, 32))
    return _captioned([canvas], caption)


def _captioned(parts: Sequence[Image.Image], caption: Sequence[str]) -> Image.Image:
    """The parts side by side above lines of text, as wide as both need."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    row = sum(part.width for part in parts) + MARGIN * (len(parts) - 1)
    width = max(row, *(math.ceil(font.getlength(text)) for text in caption)) + 2 * MARGIN
    height = max(part.height for part in parts)
    canvas = Image.new("RGB", (width, height + 2 * MARGIN + LINE * len(caption) + MARGIN), "white")
    left = MARGIN
    for part in parts:
        canvas.paste(part, (left, MARGIN))
        left += part.width + MARGIN
    pen = ImageDraw.Draw(canvas)
    for number, text in enumerate(caption):
        pen.text((MARGIN, height + 2 * MARGIN + LINE * number), text, fill="black", font=font)
    return canvas
