"""The precision plan: for each weighted layer and each attention of a model what it is computed in, how, and why.

A value of the bundle, as JSON: readable, editable, and taken again by `--plan`. It names layers of the canonical model,
so that one plan serves every target; each target's lowering says what it does with a scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from enum import StrEnum

import msgspec

PLAN_VERSION = 1


class Scheme(StrEnum):
    """How a layer's operands are represented. INT8 weights are symmetric per output channel, except WEIGHT_ONLY's."""

    FLOAT = "float"
    """In the precision of the variant around it."""

    PER_TOKEN = "int8-per-token"
    """Linear layers: activations unsigned, with scale and zero point of their own for each token, found at run time."""

    STATIC = "int8-static"
    """Activations with one calibrated range for the whole tensor: convolutions, and whatever TensorRT runs."""

    WEIGHT_ONLY = "int8-weights"
    """Linear layers on the CPU: weights in blocks of inputs, each with its scale; activations are rounded to 8 bits by
    the same blocks at run time."""

    FP8 = "fp8"
    """Linear layers and convolutions on TensorRT: E4M3, weights per output channel, activations with one calibrated
    scale for the whole tensor."""

    FLOAT32 = "float32"
    """FP32 in a variant that is FP16, BF16, INT8 or FP8 on a GPU. On the CPU it says the same as FLOAT."""

    @property
    def quantizes(self) -> bool:
        return self not in (Scheme.FLOAT, Scheme.FLOAT32)


class LayerPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`layer`: a node of the canonical model (`blocks.0.mlp.fc1/MatMul`), or in a plan that somebody wrote a module
    path, for every layer below it. `reason`: why the scheme is not the one that was asked for, or how it was chosen."""

    layer: str
    scheme: Scheme
    reason: str = ""


class PrecisionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`smoothing`: by the norm's node, the strength of SmoothQuant (Xiao et al. 2023, equation 4) between it and the
    layers that read it. `equalized`: cross-layer equalization along ReLU chains (Nagel et al. 2019, section 4.1) was
    applied. `corrected`: biases were corrected for the mean error of quantization (the same, section 4.2)."""

    layers: tuple[LayerPlan, ...] = ()
    smoothing: dict[str, float] = {}
    equalized: bool = False
    corrected: bool = False
    version: int = PLAN_VERSION

    def scheme(self, layer: str) -> Scheme:
        return next((p.scheme for p in self.layers if p.layer == layer), Scheme.FLOAT)

    @property
    def counts(self) -> dict[str, int]:
        """How many layers have each scheme."""
        return dict(Counter(str(p.scheme) for p in self.layers).most_common())

    @property
    def quantized(self) -> tuple[str, ...]:
        """The layers that are not in floating point."""
        return tuple(p.layer for p in self.layers if p.scheme.quantizes)

    def of(self, *schemes: Scheme) -> tuple[str, ...]:
        """The layers with one of these schemes."""
        return tuple(p.layer for p in self.layers if p.scheme in schemes)

    @property
    def exempt(self) -> tuple[str, ...]:
        """Names of the weighted layers left in the float type around them, with the reason."""
        return tuple(f"{p.layer}: {p.reason}" for p in self.layers if p.scheme is Scheme.FLOAT)

    def restricted(self, layers: Collection[str]) -> PrecisionPlan:
        """All but `layers` in floating point."""
        kept = tuple(p if p.layer in layers else LayerPlan(p.layer, Scheme.FLOAT, p.reason) for p in self.layers)
        return msgspec.structs.replace(self, layers=kept)
