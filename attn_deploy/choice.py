"""The budget that a candidate must keep, and the choice of the fastest that keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_deploy.parity import (
    BF16_MIN_SQNR_DB,
    FP16_MIN_SQNR_DB,
    FP32_MAX_REL,
    FP32_MIN_SQNR_DB,
    INT8_MIN_SQNR_DB,
    Tolerance,
)
from attn_deploy.receipt import Accuracy, CandidateEntry
from attn_deploy.target import Precision, Target

MIN_SHARE = 0.9
"""`int8` and `fp8`, and `fp16` and `bf16` on a GPU, mean that at least this share of the multiply-adds of linear layers
and convolutions is in that type."""

FLOORS_DB = {
    Precision.FP32: FP32_MIN_SQNR_DB,
    Precision.FP16: FP16_MIN_SQNR_DB,
    Precision.BF16: BF16_MIN_SQNR_DB,
    Precision.INT8: 0.0,
    Precision.FP8: 0.0,
    Precision.AUTO: 0.0,
}

DEFAULT_MAX_DROP = 1.0


@dataclass(frozen=True)
class Budget:
    """What a candidate may lose. `min_agreement`: share of inputs whose top-1 equals FP32's; `max_drop`: points of the
    metric; `min_sqnr_db`: of every output. None takes the default of the precision."""

    min_agreement: float | None = None
    max_drop: float | None = None
    min_sqnr_db: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the user gave any of it."""
        return any(v is not None for v in (self.min_agreement, self.max_drop, self.min_sqnr_db))

    def describe(self) -> str:
        """All of it, for a precision whose plan is searched."""
        given = [f"{self.tolerance(Precision.AUTO).min_sqnr_db:g} dB or more"]
        if self.min_agreement is not None:
            given.append(f"agreement {self.min_agreement:g} or more")
        if self.max_drop is not None:
            given.append(f"a drop of {self.max_drop:g} points at most")
        return ", ".join(given)

    def tolerance(self, precision: Precision) -> Tolerance:
        """Of every output: the user's floor, and never below what the precision must give anyway."""
        given = self.min_sqnr_db
        if given is None:
            given = INT8_MIN_SQNR_DB if precision.quantized else 0.0
        max_rel = FP32_MAX_REL if precision is Precision.FP32 else None
        return Tolerance(max(FLOORS_DB[precision], given), max_rel)

    def accuracy_fault(self, agreement: float | None, accuracy: Accuracy | None) -> str | None:
        """Why the accuracy misses the budget, or None."""
        if self.min_agreement is not None and agreement is not None and agreement < self.min_agreement:
            return f"agreement {agreement:.4f}, budget {self.min_agreement:.4f}"
        if accuracy is not None:
            drop = accuracy.reference - accuracy.value
            allowed = DEFAULT_MAX_DROP if self.max_drop is None else self.max_drop
            if drop > allowed + 1e-9:
                return f"{accuracy.metric} drops by {drop:.2f} points, budget {allowed:.2f}"
        return None


_TYPES = {Precision.INT8: "int8", Precision.FP8: "float8", Precision.FP16: "float16", Precision.BF16: "bfloat16"}


def share_fault(target: Target, precision: Precision, weighted_dtype_share: dict[str, float]) -> str | None:
    """Why a candidate is not in the precision that was asked, or None. FP16 on a CPU is storage: nothing to check."""
    kind = _TYPES.get(precision)
    if kind is None or (precision is not Precision.INT8 and not target.on_gpu):
        return None
    share = weighted_dtype_share.get(kind, 0.0)
    if share < MIN_SHARE:
        said = str(precision).upper()
        return f"only {share:.1%} of the multiply-adds of linear layers and convolutions are in {said}"
    return None


def choose(candidates: Sequence[CandidateEntry], clearly_faster: Callable[[str, str], bool]) -> dict[str, str]:
    """Target -> id of its choice: the plainest passed candidate than which the fastest is not clearly faster.

    Candidates come plainest first, so that a lower precision or a kernel of ours stays only where it wins.
    `clearly_faster(a, b)` is the verdict of the measurement on two ids. Without latencies the first one is taken.
    """
    chosen: dict[str, str] = {}
    for target in dict.fromkeys(c.target for c in candidates):
        passed = [c for c in candidates if c.target == target and c.status == "passed"]
        if not passed:
            continue
        fastest = min(passed, key=_time)
        plainest = next(c for c in passed if c is fastest or not clearly_faster(fastest.id, c.id))
        chosen[target] = plainest.id
    return chosen


def _time(candidate: CandidateEntry) -> float:
    return candidate.latency.p50_ms if candidate.latency is not None else float("inf")
