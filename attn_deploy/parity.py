"""Distances between tensors, and the tolerances that make a candidate the same model."""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.receipt import Fidelity
from attn_deploy.session import Array

FP32_MIN_SQNR_DB = 60.0
FP32_MAX_REL = 1e-4
"""Largest error of an FP32 output, as a share of the reference's range."""

FP16_MIN_SQNR_DB = 45.0
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
