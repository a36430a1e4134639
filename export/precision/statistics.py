"""Statistics of activations, collected over batches in memory that does not grow with them.

What a batch returns is added to what was seen so far (observation.py), in one pass over the data: decoding it costs
more than a second run of a small model would, and a pass that knows nothing of those before can be continued from a
file, with more samples than were planned.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.collected import Statistics, ValueStatistics
from attn_deploy.export.precision.observation import Seen, Wanted, observing, read
from attn_deploy.export.precision.statistics_file import load_statistics, model_hash, save_statistics
from attn_deploy.session import Array

__all__ = ["Statistics", "ValueStatistics", "Wanted", "collect_statistics", "load_statistics", "save_statistics"]

LEAST_SHARE = 0.25
"""Of the samples that were asked for: with fewer, ranges would say little of the data."""

SAVE_EVERY_S = 5.0
"""What a killed run loses at most."""


def collect_statistics(
    model: ir.Model,
    wanted: Sequence[Wanted],
    batches: Iterable[Mapping[str, Array]],
    open_model: OpenModel,
    *,
    seed: int = 0,
    asked: int | None = None,
    path: Path | None = None,
) -> Statistics:
    """One pass over `batches`, of which every pass begins with the same samples. `wanted`: each name once.

    `path`: a file that is written as it goes and continued where it is there: what it has seen is passed over, so that
    a stopped run goes on and more samples can be added. One that lacks something wanted is collected anew. `asked`: how
    many samples were to be seen.

    Raises UsageError naming the sample that makes an activation not finite, for fewer samples than LEAST_SHARE of those
    asked for (1 without `asked`), and for a file of another model or seed.
    """
    known = load_statistics(path, model, seed=seed) if path is not None and path.exists() else None
    if known is None or not known.hold(wanted):
        known = Statistics(model_hash(model), seed)
    accumulator = _Accumulator(wanted, known)
    saved_at = time.monotonic()
    if wanted:
        try:
            run = open_model(observing(model, wanted))
            for feeds in _unseen(batches, known.samples):
                accumulator.add(feeds, run(feeds))
                if path is not None and time.monotonic() - saved_at > SAVE_EVERY_S:
                    save_statistics(accumulator.statistics(), path)
                    saved_at = time.monotonic()
        finally:
            if path is not None and accumulator.samples > known.samples:
                save_statistics(accumulator.statistics(), path)
        _require_enough(accumulator.samples, asked)
    return accumulator.statistics()


class _Accumulator:
    """What was seen so far."""

    def __init__(self, wanted: Sequence[Wanted], known: Statistics) -> None:
        self._wanted = wanted
        self._known = known
        self._values = dict(known.values)
        self.samples = known.samples

    def add(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """All of a batch, or nothing of it where it holds what is not finite."""
        count = _batch_size(feeds)
        seen = {w.name: read(w, outputs) for w in self._wanted}
        for name, each in seen.items():
            _require_finite(name, each, self.samples, count)
        for wanted in self._wanted:
            batch = _of_batch(seen[wanted.name], wanted)
            before = self._values.get(wanted.name)
            self._values[wanted.name] = batch if before is None else before + batch
        self.samples += count

    def statistics(self) -> Statistics:
        return replace(self._known, samples=self.samples, values=dict(self._values))


def _of_batch(seen: Seen, wanted: Wanted) -> ValueStatistics:
    low, high = seen.minimum.min(axis=0), seen.maximum.max(axis=0)
    channels = (low, high) if wanted.channel_axis is not None else (None, None)
    return ValueStatistics(float(low.min()), float(high.max()), seen.histogram, *channels)


def _batch_size(feeds: Mapping[str, Array]) -> int:
    return next((len(value) for value in feeds.values() if np.ndim(value)), 1)


def _unseen(batches: Iterable[Mapping[str, Array]], seen: int) -> Iterator[Mapping[str, Array]]:
    """The batches without their first `seen` samples."""
    for feeds in batches:
        size = _batch_size(feeds)
        if seen >= size:
            seen -= size
            continue
        if seen:
            yield {name: value[seen:] if np.ndim(value) and len(value) == size else value
                   for name, value in feeds.items()}  # fmt: skip
            seen = 0
        else:
            yield feeds


def _require_finite(name: str, seen: Seen, before: int, count: int) -> None:
    finite = np.asarray(np.isfinite(seen.minimum).all(axis=1) & np.isfinite(seen.maximum).all(axis=1))
    if finite.all():
        return
    row = int(np.argmin(finite))
    sample = before + row * count // len(finite)  # windows and heads share a sample's rows out among the first axis
    raise UsageError(
        "an activation is not finite on the calibration data",
        where=name,
        got=f"NaN or infinity at sample {sample} of calibration, the first one being 0",
        expected="numbers",
        next_step="remove that sample, or look for values that are far beyond the others",
    )


def _require_enough(seen: int, asked: int | None) -> None:
    if not seen:
        expected = "at least 1" if asked is None else f"{asked}, which were asked for"
        raise UsageError("calibration saw no sample", got=0, expected=expected, next_step="give more samples")
    if asked is not None and seen < LEAST_SHARE * asked:
        raise UsageError(
            "calibration saw too few samples",
            got=f"{seen} samples were seen",
            expected=f"{asked}, which were asked for, or a quarter of them at least",
            next_step="give more samples, or ask for fewer with --calibration-samples",
        )
