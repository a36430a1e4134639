"""Which samples calibrate and which judge, and how they are streamed.

The split is a function of the seed and the samples' keys alone. Keys are ordered by sha256("seed:key"); the first
`judgement` of them judge, the following `calibration` calibrate, so that asking for more calibration never changes
what is judged. Where there are fewer samples than asked for, calibration is served first but takes half at most:
judgement keeps the first max(samples - calibration, half).

The number of samples of a function is not known beforehand. There, a sample whose hash is divisible by
`CALIBRATION_SHARE` may calibrate, any other may judge, and each part ends when it has what was asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from attn_deploy.data.function import SampleFunction
from attn_deploy.data.images import ImageFolder
from attn_deploy.data.npz import NpzFile
from attn_deploy.data.sample import Sample, Unreadable
from attn_deploy.errors import UsageError
from attn_deploy.session import Array

CALIBRATION_SHARE = 4
"""One sample in four of a function: judging takes several times as many samples as calibration (500 and 64)."""

UNREADABLE_COUNT = 3
UNREADABLE_PERCENT = 5
"""A part may pass over this many files whatever its size, or this share of them, but never all of them."""

Source = ImageFolder | NpzFile | SampleFunction


@dataclass(frozen=True)
class Batch:
    """`feeds`: per input [batch, ...]. `labels`: int64 [batch], None without labels. `keys`: one per sample."""

    feeds: dict[str, Array]
    labels: Array | None
    keys: tuple[str, ...]


class Part:
    """The samples that calibrate, or those that judge. Every call of `batches` is a pass of its own.

    `size` is how many samples are assigned, before unreadable ones are passed over; None where only a pass can tell.
    """

    def __init__(
        self,
        name: str,
        size: int | None,
        samples: Callable[[], Iterator[Sample | Unreadable]],
        record: Callable[[str], None],
        description: str,
    ) -> None:
        self.name = name
        self.size = size
        self._samples = samples
        self._record = record
        self._description = description

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of `batch_size`, the last one smaller. Samples of different shapes never share a batch.

        Raises UsageError for a wrong sample, for too many unreadable ones, and when nothing at all is readable.
        """
        if batch_size < 1:
            raise UsageError("a batch holds at least one sample", got=batch_size, expected="1 or more")
        pending: list[Sample] = []
        for sample in self._readable():
            if pending and (len(pending) == batch_size or _shapes(sample) != _shapes(pending[0])):
                yield _stack(pending)
                pending = []
            pending.append(sample)
        if pending:
            yield _stack(pending)

    def _readable(self) -> Iterator[Sample]:
        allowed = max(UNREADABLE_COUNT, (self.size or 0) * UNREADABLE_PERCENT // 100)
        skipped: list[Unreadable] = []
        read = 0
        for sample in self._samples():
            if isinstance(sample, Sample):
                read += 1
                yield sample
                continue
            self._record(sample.key)
            skipped.append(sample)
            if len(skipped) > allowed:
                self._raise_unreadable(skipped, read, f"{allowed} at most")
        if read == 0 and self.size != 0:
            self._raise_unreadable(skipped, read, "1 sample at least")

    def _raise_unreadable(self, skipped: list[Unreadable], read: int, expected: str) -> None:
        shown = "; ".join(f"{sample.key} ({sample.reason})" for sample in skipped[:3])
        raise UsageError(
            f"too many samples of the {self.name} part are unreadable" if skipped else f"no sample for {self.name}",
            where=self._description,
            got=f"{len(skipped)} unreadable of the first {len(skipped) + read}" + (f": {shown}" if shown else ""),
            expected=expected,
            next_step="remove or replace these files" if skipped else "give more samples",
        )


@dataclass(frozen=True)
class Split:
    """Two disjoint parts. `note` says what was changed where there are fewer samples than asked for."""

    calibration: Part
    judgement: Part
    note: str | None


class Dataset:
    """What `--data` names, opened and checked as far as that goes without reading the samples."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._unreadable: dict[str, None] = {}
        self._short: dict[str, str] = {}
        self.labelled = source.labelled
        self.description = source.description

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Files that were passed over so far, each once."""
        return tuple(self._unreadable)

    @property
    def short(self) -> tuple[str, ...]:
        """A note for each part of a function that ended before it had what was asked for, once a pass has told."""
        return tuple(self._short.values())

    def keys(self) -> list[str]:
        """Keys of all samples, without decoding any; empty for a function, whose samples only a pass can tell."""
        return [] if isinstance(self._source, SampleFunction) else self._source.keys()

    def split(self, calibration: int, judgement: int, seed: int) -> Split:
        """Parts of these sizes, either may be 0. Raises UsageError when a part that was asked for gets no sample."""
        if calibration < 0 or judgement < 0 or calibration + judgement == 0:
            raise UsageError(
                "no samples were asked for",
                got=f"calibration {calibration}, judgement {judgement}",
                expected="0 or more each, 1 or more together",
            )
        source = self._source
        if isinstance(source, SampleFunction):
            return self._split_stream(source, calibration, judgement, seed)
        keys = sorted(source.keys(), key=lambda key: _digest(seed, key))
        total = len(keys)
        judged = min(judgement, max(total - calibration, (total + 1) // 2))
        calibrating = min(calibration, total - judged)
        if (judgement and not judged) or (calibration and not calibrating):
            raise UsageError(
                "too few samples to keep calibration and judgement apart",
                where=self.description,
                got=f"{total} samples",
                expected=f"{calibration} for calibration and {judgement} for judgement, 1 of each at least",
            )
        note = None
        if total < calibration + judgement:
            note = (
                f"{total} samples where {calibration} + {judgement} were asked for: "
                f"{calibrating} calibrate, {judged} judge"
            )
        # Dicts: ordered, and asked for membership by sources that can only be read in their own order.
        calibrates = dict.fromkeys(keys[judged : judged + calibrating])
        judges = dict.fromkeys(keys[:judged])
        return Split(
            self._part("calibration", calibrating, lambda: source.samples(calibrates)),
            self._part("judgement", judged, lambda: source.samples(judges)),
            note,
        )

    def _split_stream(self, source: SampleFunction, calibration: int, judgement: int, seed: int) -> Split:
        def part(name: str, calibrates: bool, count: int) -> Part:
            def samples() -> Iterator[Sample]:
                if count == 0:
                    return
                read = 0
                for read, sample in enumerate(source.samples(_HashShare(seed, calibrates)), start=1):
                    yield sample
                    if read == count:
                        return
                self._short[name] = f"{read} {self.description} for {name} where {count} were asked for"

            return self._part(name, None if count else 0, samples)

        note = f"one sample in {CALIBRATION_SHARE} of a function may calibrate, the others may judge"
        return Split(part("calibration", True, calibration), part("judgement", False, judgement), note)

    def _part(self, name: str, size: int | None, samples: Callable[[], Iterator[Sample | Unreadable]]) -> Part:
        return Part(name, size, samples, self._record, self.description)

    def _record(self, key: str) -> None:
        self._unreadable[key] = None


@dataclass(frozen=True)
class _HashShare:
    """The keys that may calibrate, or all others."""

    seed: int
    calibrates: bool

    def __contains__(self, key: object) -> bool:
        return (_digest(self.seed, str(key))[-1] % CALIBRATION_SHARE == 0) == self.calibrates


def require_labels(dataset: Dataset, why: str) -> None:
    """Raises UsageError when `dataset` has no labels; `why` is the option or step that needs them."""
    if not dataset.labelled:
        raise UsageError(
            "data without labels where accuracy was asked",
            where=dataset.description,
            got=f"{why}, and samples without labels",
            expected="one subfolder per class, `labels` in the .npz, or a function that yields (feeds, label)",
            next_step=f"give labelled data, or leave out {why}",
        )


def _digest(seed: int, key: str) -> bytes:
    # File names that are not UTF-8 reach Python as lone surrogates, which a strict encoder refuses.
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in sample.feeds.items()}


def _stack(samples: list[Sample]) -> Batch:
    feeds = {name: np.stack([sample.feeds[name] for sample in samples]) for name in samples[0].feeds}
    labels = None
    if samples[0].label is not None:
        labels = np.array([sample.label for sample in samples], np.int64)
    return Batch(feeds, labels, tuple(sample.key for sample in samples))
