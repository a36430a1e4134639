"""Targets and precisions: what a candidate is built for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum

from attn_deploy.errors import UsageError


class Target(StrEnum):
    """Where a variant runs."""

    ONNXRUNTIME_CPU = "onnxruntime-cpu"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    TENSORRT = "tensorrt"

    @property
    def on_gpu(self) -> bool:
        return self is not Target.ONNXRUNTIME_CPU


class Precision(StrEnum):
    """What the multiply-adds of linear layers and convolutions are computed in.

    `FP16` on an x86 CPU is a storage format: the weights are stored in half precision and computed in FP32,
    since no x86 kernel of ONNX Runtime multiplies in FP16 (receipt: `storage`, with `dtype_share` float32). On a GPU
    `FP16` and `BF16` are what is computed in, said by the types of the graph; the model's inputs and outputs stay FP32.

    `INT8` on the CPU has a form whose weights are quantized in blocks of inputs (candidates that end in `-weights`,
    scheme `int8-weights` of a plan): the file keeps them in 8 bits, and ONNX Runtime's MatMulNBits quantizes the
    activations by the same blocks and multiplies integers. `FP8` is E4M3, and TensorRT's alone.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    AUTO = "auto"
    """As a precision plan says, layer by layer: one that was searched under the budget, or the user's own. Unlike INT8
    it promises no share: INT8 is where it is worth its loss."""

    @property
    def quantized(self) -> bool:
        """Whether a plan decides, and ranges of activations fit typical inputs alone."""
        return self in (Precision.INT8, Precision.FP8, Precision.AUTO)


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean ...` for a misspelt name, or the known names when none is near."""
    names = sorted(known)

    def likeness(candidate: str) -> float:
        """Of the whole names, or of the beginning alone: long names are often typed in part."""
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        return max(whole, difflib.SequenceMatcher(None, name, candidate[: len(name) + 1]).ratio() - 0.01)

    close = [n for n in sorted(names, key=likeness, reverse=True)[:3] if likeness(n) >= 0.5]
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = ", ".join(names[:12])
    return f"one of: {shown}" + (", ..." if len(names) > 12 else "")


def parse_target(text: str) -> Target:
    """`onnxruntime-cpu` -> Target. Raises UsageError with the nearest name."""
    try:
        return Target(text.replace("_", "-"))
    except ValueError:
        known = [str(t) for t in Target]
        raise UsageError("unknown target", got=text, expected=nearest(text, known)) from None


def parse_precision(text: str) -> Precision:
    """`int8` -> Precision. Raises UsageError with the nearest name."""
    try:
        return Precision(text)
    except ValueError:
        known = [str(p) for p in Precision]
        raise UsageError("unknown precision", got=text, expected=nearest(text, known)) from None
