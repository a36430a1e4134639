"""The embedded demo model: what `attn-deploy export` exports when it is given no source.

Only paths and the preprocessing live here, so that `load` and `run` can ask for them without PyTorch; the network is in
`attn_deploy.demo.model`. Everything under `WEIGHTS`, `HELD_OUT` and `SAMPLE_IMAGES` is written by
`python -m attn_deploy.demo.train`.
"""

from __future__ import annotations

from pathlib import Path

from attn_deploy.preprocess import Preprocess

__all__ = ["HELD_OUT", "LABELS", "SAMPLE_IMAGES", "WEIGHTS", "preprocess"]

_HERE = Path(__file__).resolve().parent

WEIGHTS = _HERE / "weights.safetensors"
HELD_OUT = _HERE / "held_out.npz"
"""`image` float32 [samples, 1, 16, 16] as the model takes it, `labels` int64 [samples]; never trained on."""

SAMPLE_IMAGES = _HERE / "samples"
"""A folder of PNG files `{label}_{number}.png`, drawn from the held-out images."""

LABELS = tuple("0123456789")


def preprocess() -> Preprocess:
    """Grey image of any size -> `image` [1, 16, 16]. Mean and std are those of the training images at 16x16."""
    return Preprocess(
        input="image", mode="L", resize=(16, 16), interpolation="bilinear", crop=(16, 16), mean=(0.305,), std=(0.341,)
    )
