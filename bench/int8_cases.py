"""The models of the INT8 table: where each comes from, what judges it, and its goals."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cifar_nets import PREPROCESS
from common import HERE


class Kind(StrEnum):
    """What NNCF is told, as its documentation advises: the type of a transformer, the preset `mixed` (activations
    asymmetric) for networks with activations other than ReLU, else nothing."""

    TRANSFORMER = "transformer"
    MIXED = "mixed"
    PLAIN = "plain"


class Samples(StrEnum):
    """Labelled photographs of the data folder, CIFAR-10's test images of it, or made inputs."""

    PHOTOGRAPHS = "photographs"
    CIFAR10 = "CIFAR-10 test images"
    MADE = "made inputs"


@dataclass(frozen=True)
class Goals:
    """SQNR and agreement at least, points of top-1 lost at most; ratios of times over those of others, None where
    there is no goal. `stretch` is over OpenVINO too."""

    sqnr_db: float | None = None
    agreement: float | None = None
    max_drop: float | None = None
    over_fp32: float | None = None
    over_openvino: float | None = None
    stretch: float | None = None
    ceiling_share: float | None = None


@dataclass(frozen=True)
class Case:
    """`weights` is a file of the data folder where `trained`, or what `--weights` takes; None: the source's own.
    `calibrated` and `judged` are numbers of samples, no sample in both."""

    source: str
    kind: Kind
    goals: Goals
    weights: str | None = "init:0"
    samples: Samples = Samples.PHOTOGRAPHS
    trained: bool = False
    calibrated: int = 64
    judged: int = 64
    preprocess: Path | None = None

    @property
    def origin(self) -> str:
        """Of the weights, for the table."""
        made = "trained" if self.trained else "made by our initializer"
        return "trained by us" if self.weights is None else made


def _cifar(name: str) -> Case:
    return Case(
        f"cifar_nets.network:{name}", Kind.PLAIN, Goals(max_drop=0.3), weights=None, samples=Samples.CIFAR10,
        trained=True, calibrated=500, judged=9500, preprocess=PREPROCESS,
    )  # fmt: skip


CASES: dict[str, Case] = {
    # 300 samples are NNCF's default; the other 200 photographs judge.
    "vit_tiny_patch16_224": Case(
        "timm:vit_tiny_patch16_224", Kind.TRANSFORMER, Goals(28, 0.98, 0.5, 2.2, 1.75, 2.2),
        weights="vit_tiny_patch16_224.safetensors", trained=True, calibrated=300, judged=200,
    ),
    "vit_small_patch16_224": Case(
        "timm:vit_small_patch16_224", Kind.TRANSFORMER,
        Goals(28, over_fp32=2.3, over_openvino=1.5, stretch=1.8, ceiling_share=0.45),
    ),
    "swin_tiny_patch4_window7_224": Case(
        "timm:swin_tiny_patch4_window7_224", Kind.TRANSFORMER,
        Goals(28, over_fp32=2.2, over_openvino=1.4, stretch=1.8, ceiling_share=0.45),
    ),
    "bert_base_128": Case(
        f"hf:{HERE / 'configs' / 'bert_base'}", Kind.TRANSFORMER,
        Goals(28, over_fp32=2.2, over_openvino=1.3, stretch=1.6), samples=Samples.MADE,
    ),
    "seresnet50": Case("timm:seresnet50", Kind.PLAIN, Goals(25, over_fp32=1.8, stretch=1.0)),
    "ecaresnet50t": Case("timm:ecaresnet50t", Kind.PLAIN, Goals(25, over_fp32=1.8, stretch=1.0)),
    "efficientnet_b0": Case("timm:efficientnet_b0", Kind.MIXED, Goals(22, over_fp32=1.2, stretch=1.3)),
    "mobilenetv3_large_100": Case("timm:mobilenetv3_large_100", Kind.MIXED, Goals(22, over_fp32=1.2, stretch=1.3)),
    "cifar_se": _cifar("se"),
    "cifar_cbam": _cifar("cbam"),
    "cifar_eca": _cifar("eca"),
}  # fmt: skip
