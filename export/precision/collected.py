"""What is known of a model's activations: extrema, histograms, channels. statistics.py collects it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from attn_deploy.export.precision.histogram import Histogram
from attn_deploy.export.precision.observation import Wanted
from attn_deploy.export.precision.ranges import Range, RangeMethod, asymmetric_range, symmetric_limit
from attn_deploy.session import Array


@dataclass(frozen=True)
class ValueStatistics:
    """Of one activation over all samples; `channel_low`, `channel_high`: float32 [channels]."""

    low: float
    high: float
    histogram: Histogram | None = None
    channel_low: Array | None = None
    channel_high: Array | None = None

    def range(self, method: RangeMethod = RangeMethod.MIN_MAX) -> Range:
        """For asymmetric unsigned levels. Methods other than MIN_MAX need the histogram."""
        if method is RangeMethod.MIN_MAX:
            return Range(self.low, self.high)
        return asymmetric_range(self._counted(method), self.low, self.high, method)

    def limit(self, method: RangeMethod = RangeMethod.MIN_MAX) -> float:
        """The |x| of the last of 127 symmetric levels. Methods other than MIN_MAX need the histogram."""
        if method is RangeMethod.MIN_MAX:
            return self.largest
        return symmetric_limit(self._counted(method), self.largest, method)

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))

    def channel_largest(self) -> Array:
        """max |x| of each channel, float32 [channels]."""
        assert self.channel_low is not None
        assert self.channel_high is not None
        return np.maximum(np.abs(self.channel_low), np.abs(self.channel_high))

    def _counted(self, method: RangeMethod) -> Histogram:
        if self.histogram is None:
            raise ValueError(f"{method.name} needs a histogram, which was not collected")
        return self.histogram

    def __add__(self, other: ValueStatistics) -> ValueStatistics:
        return ValueStatistics(
            min(self.low, other.low),
            max(self.high, other.high),
            None if self.histogram is None or other.histogram is None else self.histogram + other.histogram,
            _both(np.minimum, self.channel_low, other.channel_low),
            _both(np.maximum, self.channel_high, other.channel_high),
        )

    def holds(self, wanted: Wanted) -> bool:
        """Whether nothing of what is wanted is missing."""
        histogram = self.histogram is not None or not wanted.histogram
        return histogram and (self.channel_low is not None or wanted.channel_axis is None)


@dataclass(frozen=True)
class Statistics:
    """`model`: hash of the model they were collected from; `seed`: of the order of the samples; `samples`: how many
    were seen; `values` by name."""

    model: str = ""
    seed: int = 0
    samples: int = 0
    values: Mapping[str, ValueStatistics] = field(default_factory=dict)
    means: Mapping[str, Array] = field(default_factory=dict)
    """Of each channel of what convolutions in 8-bit chains read, float64 [channels] by value name."""

    def ranges(self, method: RangeMethod = RangeMethod.MIN_MAX) -> dict[str, Range]:
        return {name: value.range(method) for name, value in self.values.items()}

    def hold(self, wanted: Iterable[Wanted]) -> bool:
        return all(w.name in self.values and self.values[w.name].holds(w) for w in wanted)

    def dead_channels(self) -> tuple[str, ...]:
        """A note where channels were zero in every sample; none where there are no such."""
        largest = {n: v.channel_largest() for n, v in self.values.items() if v.channel_low is not None}
        return dead_channels_note(largest)


SHOWN = 3
"""Activations that a note names."""


def dead_channels_note(largest: Mapping[str, Array]) -> tuple[str, ...]:
    """One note or none. `largest`: max |x| of each channel, [channels], by what has them."""
    dead = {name: np.flatnonzero(values == 0) for name, values in largest.items()}
    found = [f"{name} ({', '.join(map(str, d[:SHOWN]))}{', ...' if d.size > SHOWN else ''})"
             for name, d in dead.items() if d.size]  # fmt: skip
    if not found:
        return ()
    total, more = sum(d.size for d in dead.values()), "; ..." if len(found) > SHOWN else ""
    what = "channel is" if total == 1 else "channels are"
    return (f"{total} {what} always zero on the calibration data: {'; '.join(found[:SHOWN])}{more}",)


def _both(function: np.ufunc, one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None else function(one, other)  # type: ignore[no-any-return]
