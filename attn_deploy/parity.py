"""Distances between tensors, and the tolerances that make a candidate the same model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attn_deploy.inputs import FLOATS, ExampleInput, feeds_batch, make_feeds, sequence_length
from attn_deploy.receipt import CaseParity, Fidelity, Parity, SiteParity
from attn_deploy.session import BATCH, SEQUENCE, Array, DimBounds
from attn_deploy.target import Precision

FP32_MIN_SQNR_DB = 60.0
FP32_MAX_REL = 1e-4
"""Largest error of an FP32 output, as a share of the reference's range."""

FP16_MIN_SQNR_DB = 45.0
BF16_MIN_SQNR_DB = 35.0
INT8_MIN_SQNR_DB = 20.0
"""INT8 without a budget of the user's."""

EXACT_DB = 200.0
"""What identical tensors score: infinity has no place in JSON."""


def sqnr_db(reference: Array, value: Array) -> float:
    """Signal to quantization noise ratio, 10 log10(sum r^2 / sum (r - v)^2), in dB; EXACT_DB for equal tensors."""
    moments = Moments()
    moments.add(reference, value)
    return moments.fidelity().sqnr_db


class Moments:
    """Running sums from which fidelity follows: its memory does not grow with the number of samples."""

    def __init__(self) -> None:
        self.inputs = 0
        self._signal = self._noise = self._dot = self._power = 0.0
        self._max_abs = 0.0
        self._low, self._high = math.inf, -math.inf
        self._finite = True

    def add(self, reference: Array, value: Array) -> None:
        """Adds one batch. Raises ValueError when the shapes differ."""
        if reference.shape != value.shape:
            raise ValueError(f"shapes differ: reference {reference.shape}, value {value.shape}")
        self.inputs += len(reference) if reference.ndim else 1
        if not reference.size:
            return
        r = reference.astype(np.float64).ravel()
        v = value.astype(np.float64).ravel()
        same = (r == v) | (np.isnan(r) & np.isnan(v))
        if not np.isfinite(r[~same]).all() or not np.isfinite(v[~same]).all():
            self._finite = False
            return
        kept = np.isfinite(r)
        r, v = r[kept], v[kept]
        if not r.size:
            return
        difference = r - v
        self._signal += float(r @ r)
        self._noise += float(difference @ difference)
        self._power += float(v @ v)
        self._dot += float(r @ v)
        self._max_abs = max(self._max_abs, float(np.abs(difference).max()))
        self._low, self._high = min(self._low, float(r.min())), max(self._high, float(r.max()))

    @property
    def constant(self) -> bool:
        """True when the reference never varied: its parity proves nothing."""
        return self._high <= self._low

    def fidelity(self) -> Fidelity:
        """A candidate with NaN or infinity where the reference has none scores -EXACT_DB."""
        if not self._finite:
            return Fidelity(max_abs=float(np.finfo(np.float32).max), max_rel=1e9, cosine=-1.0, sqnr_db=-EXACT_DB)
        scale = max(abs(self._low), abs(self._high), self._high - self._low) if self._high >= self._low else 0.0
        norm = math.sqrt(self._signal * self._power)
        return Fidelity(
            max_abs=self._max_abs,
            max_rel=self._max_abs / scale if scale else float(self._max_abs > 0),
            cosine=self._dot / norm if norm else float(self._noise == 0),
            sqnr_db=_decibel(self._signal, self._noise),
        )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return EXACT_DB
    if signal == 0:
        return -EXACT_DB
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal / noise)))


@dataclass(frozen=True)
class Case:
    """One kind of input to compare on. `typical` inputs look like what the model will see; the others stress it.

    `slack_db` is taken off the tolerance: far out of its range a deep model amplifies FP32's own rounding.
    """

    name: str
    feeds: Mapping[str, Array]
    typical: bool
    slack_db: float = 0.0


@dataclass(frozen=True)
class SiteCase:
    """One site of a candidate alone: a small ONNX model, the reference's values for its inputs and for its result.
    `arithmetic`: the coarsest that it computes in, which need not be the candidate's: attention beside INT8 layers is
    in FP32."""

    module: str
    model: bytes
    feeds: Mapping[str, Array]
    expected: Array
    arithmetic: Precision = Precision.FP32


@dataclass(frozen=True)
class Tolerance:
    """What an output may lose. `max_rel` None leaves the verdict to the SQNR."""

    min_sqnr_db: float
    max_rel: float | None

    def holds(self, fidelity: Fidelity) -> bool:
        close = self.max_rel is None or fidelity.max_rel <= self.max_rel
        return fidelity.sqnr_db >= self.min_sqnr_db and close

    def describe(self) -> str:
        relative = "" if self.max_rel is None else f" and an error of {self.max_rel:g} of the range at most"
        return f"{self.min_sqnr_db:g} dB or more{relative}"


LARGE_SLACK_DB = 20.0
"""efficientnet_b0 under our initializer: 62 dB between PyTorch and ONNX Runtime on inputs ten times too large."""

LARGE = 10.0
"""Standard deviation of the inputs in the case of large values."""


def other_length(length: int, bounds: DimBounds) -> int:
    """An odd sequence length inside the bounds, about half as long again as the example's; a shorter one where there
    is no longer one."""
    longer = bounds.within(length + length // 2 | 1)
    return longer if longer > length else bounds.within(length // 2 | 1)


def _sequence_cases(inputs: Sequence[ExampleInput], bounds: DimBounds, batch: int | None) -> Iterator[Case]:
    """The shortest sequence, and a shorter and a longer one than the example, both odd where the bounds allow it."""
    example = sequence_length(inputs)
    lengths = {
        "shortest sequence": bounds.min,
        "shorter sequence": bounds.within(example // 2 | 1),
        "longer sequence": bounds.within(example + example // 2 | 1),
    }
    tried = {example}
    for seed, (name, length) in enumerate(lengths.items(), start=16):
        if length not in tried:
            tried.add(length)
            feeds = make_feeds(inputs, batch=batch, seed=seed, sequence=length)
            yield Case(name, feeds, typical=name != "shortest sequence")


def parity_cases(inputs: Sequence[ExampleInput], dims: Mapping[str, DimBounds]) -> list[Case]:
    """Normal inputs, and where the batch is dynamic a single sample and an odd number of them; other lengths where the
    sequence is; large values; masks that leave one token."""
    bounds = dims.get(BATCH)

    def batch(size: int) -> int | None:
        if bounds is None:
            return None
        return bounds.within(size)

    cases = [Case("normal", make_feeds(inputs, batch=batch(2), seed=11), typical=True)]
    if bounds is not None:
        cases.append(Case("single sample", make_feeds(inputs, batch=batch(1), seed=12), typical=True))
        cases.append(Case("odd batch", make_feeds(inputs, batch=batch(3), seed=13), typical=True))
    if SEQUENCE in dims:
        cases += _sequence_cases(inputs, dims[SEQUENCE], batch(2))
    if any(i.dtype in FLOATS for i in inputs):
        cases.append(
            Case("large values", make_feeds(inputs, batch=batch(2), seed=14, magnitude=LARGE), False, LARGE_SLACK_DB)
        )
    if any(i.mask for i in inputs):
        feeds = make_feeds(inputs, batch=batch(2), seed=15)
        for item in inputs:
            if item.mask:
                feeds[item.name][..., 1:] = 0
        cases.append(Case("masked rows", feeds, typical=False))
    return cases


def compare(
    case: Case, reference: Mapping[str, Array], got: Mapping[str, Array], tolerance: Tolerance, *, judged: bool
) -> list[CaseParity]:
    """One row for each output. A reference that is constant over all its elements does not pass: it proves nothing."""
    if case.slack_db:
        tolerance = Tolerance(tolerance.min_sqnr_db - case.slack_db, None)
    rows = []
    for name, expected in reference.items():
        moments = Moments()
        moments.add(expected, got[name])
        fidelity = moments.fidelity()
        passed = tolerance.holds(fidelity) and not (moments.constant and expected.size > 1)
        rows.append(case_row(case.name, feeds_batch(case.feeds), name, fidelity, judged=judged, passed=passed))
    return rows


def case_row(case: str, inputs: int, output: str, fidelity: Fidelity, *, judged: bool, passed: bool) -> CaseParity:
    return CaseParity(
        name=case, inputs=inputs, output=output, max_abs=fidelity.max_abs, max_rel=fidelity.max_rel,
        cosine=fidelity.cosine, sqnr_db=fidelity.sqnr_db, judged=judged, passed=passed,
    )  # fmt: skip


def summarize(cases: Sequence[CaseParity], sites: Sequence[SiteParity], top1_agreement: float | None) -> Parity:
    """The worst of the judged cases stands for the candidate."""
    judged = [c for c in cases if c.judged] or list(cases)
    return Parity(
        inputs=sum({c.name: c.inputs for c in judged}.values()),
        max_abs=max(c.max_abs for c in judged),
        max_rel=max(c.max_rel for c in judged),
        cosine=min(c.cosine for c in judged),
        sqnr_db=min(c.sqnr_db for c in judged),
        top1_agreement=top1_agreement,
        cases=tuple(cases),
        sites=tuple(sites),
    )


def parity_fault(parity: Parity, tolerance: Tolerance) -> str | None:
    """Why the candidate is not the same model, or None: the first judged case or site that failed."""
    for case in parity.cases:
        if case.judged and not case.passed:
            return (
                f"output {case.output!r} on {case.name}: {case.sqnr_db:.1f} dB, max error {case.max_rel:.2g} of the "
                f"range; expected {tolerance.describe()} and a reference that varies"
            )
    for site in parity.sites:
        if not site.passed:
            least = tolerance.describe() if site.min_sqnr_db is None else f"{site.min_sqnr_db:g} dB or more"
            return f"site {site.module}: {site.sqnr_db:.1f} dB, expected {least}"
    return None
