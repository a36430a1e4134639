"""The attention weights of one image as pictures, one file per site. `weight_map` says what a picture shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from attn_deploy import runtimes
from attn_deploy.bundle import storage_errors
from attn_deploy.errors import UsageError
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.picture import bars, heat_over_image, heat_table
from attn_deploy.preprocess import Preprocess, prepare
from attn_deploy.receipt import SiteEntry
from attn_deploy.session import Array
from attn_deploy.target import Target
from attn_deploy.weight_map import Layout, weight_map

if TYPE_CHECKING:
    import onnx_ir as ir
    from PIL import Image

    from attn_deploy.export.observe import Observed


class Heatmap(msgspec.Struct, frozen=True):
    """`file` None: the site has nothing to draw, and `shows` says so."""

    module: str
    file: str | None
    shows: str


@dataclass(frozen=True)
class Subject:
    """A model, and how an image becomes its input. `batch`: of its inputs, 1 where it is dynamic."""

    canonical: ir.Model
    portable: ir.Model
    sites: Sequence[SiteEntry]
    preprocess: Preprocess | None
    inputs: Sequence[ExampleInput]
    batch: int


def draw_heatmaps(subject: Subject, image: str, out: Path) -> tuple[Heatmap, ...]:
    """Writes one PNG per site into `out`. Raises UsageError: no image input, an unreadable image, existing files."""
    from attn_deploy.export.observe import observe, watch_sites, with_outputs

    config = subject.preprocess
    if config is None or config.input not in {i.name for i in subject.inputs if len(i.shape) == 4}:
        raise UsageError(
            "--heatmap needs a model whose images are prepared in a known way", got="no image input",
            next_step="export it to a bundle with --preprocess FILE.json, and inspect the bundle",
        )  # fmt: skip
    prepared = prepare(image, config)
    sites = [s for s in subject.sites if s.node is not None]
    if not sites:
        raise UsageError("the model has no recognized attention to draw", got=f"{len(subject.sites)} skipped sites")
    files = _file_names(sites)
    taken = [out / name for name in files if (out / name).exists()]
    if taken:
        raise UsageError(
            "a picture exists already", got=str(taken[0]), next_step="choose another folder with --out, or remove it"
        )
    watches = watch_sites(subject.canonical, subject.portable, {str(s.node) for s in sites})
    seen: dict[str, Observed] = {}
    if watches:
        session = runtimes.open_session(
            Target.ONNXRUNTIME_CPU, with_outputs(subject.portable, [w.value for w in watches])
        )
        outputs = session.run(_feeds(subject, config, prepared))
        seen = {o.node: o for o in observe(watches, outputs)}
    shown = visible(prepared, config)
    made = [_heatmap(site, seen.get(str(site.node)), shown, subject.batch) for site in sites]
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for (picture, _), name in zip(made, files, strict=True):
            if picture is not None:
                picture.save(out / name, format="PNG")
    return tuple(
        Heatmap(site.module, str(out / name) if picture is not None else None, shows)
        for site, (picture, shows), name in zip(sites, made, files, strict=True)
    )


def _feeds(subject: Subject, config: Preprocess, prepared: Array) -> dict[str, Array]:
    """The image at every place of the batch; other inputs as they are made for trying the model."""
    feeds = make_feeds(subject.inputs, batch=subject.batch, seed=31)
    feeds[config.input] = np.ascontiguousarray(np.broadcast_to(prepared, (subject.batch, *prepared.shape)))
    return feeds


def _file_names(sites: Sequence[SiteEntry]) -> list[str]:
    """`module.path.png`, numbered where a module has several sites."""
    counts: Counter[str] = Counter()
    names = []
    for site in sites:
        stem = re.sub(r"[^\w.-]", "_", site.module or "top_level")
        counts[stem] += 1
        names.append(f"{stem}.png" if counts[stem] == 1 else f"{stem}-{counts[stem]}.png")
    return names


def visible(prepared: Array, config: Preprocess) -> Array:
    """What the model sees, [channels, height, width], as uint8 [height, width, 3]."""
    from PIL import Image

    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (config.mean, config.std))
    pixels = np.clip((prepared * std + mean) / config.rescale, 0, 255).round().astype(np.uint8)
    planes = [Image.fromarray(plane) for plane in pixels]
    image = planes[0] if len(planes) == 1 else Image.merge(config.mode, planes)
    return np.asarray(image.convert("RGB"))


def _heatmap(site: SiteEntry, found: Observed | None, image: Array, batch: int) -> tuple[Image.Image | None, str]:
    if found is None:
        return None, f"nothing to draw: {site.operator} has no weights of its own"
    size = None if found.chosen else (image.shape[0], image.shape[1])
    drawn = weight_map(found.operator, found.weights, found.index, size, batch)
    values = drawn.values
    caption = [
        f"{site.module or '(top level)'}: {site.operator}", drawn.shows,
        f"from {values.min():.3g} (black) to {values.max():.3g} (white)" if drawn.layout is not Layout.BARS else
        f"from {values.min():.3g} to {values.max():.3g}",
    ]  # fmt: skip
    if drawn.layout is Layout.BARS:
        return bars(values, caption), drawn.shows
    if drawn.layout is Layout.TABLE:
        return heat_table(values, caption), drawn.shows
    return heat_over_image(image, values, caption), drawn.shows
