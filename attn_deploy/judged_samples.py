"""The judged samples with what the reference gives of them, kept for passes to come as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from attn_deploy.accuracy import Run
from attn_deploy.session import Array

KEPT_BYTES = 256_000_000
"""Of feeds and outputs: 400 images of 224 x 224."""

Batches = Callable[[], Iterable[tuple[Mapping[str, Array], Array | None]]]
"""(feeds, labels or None); every call is a pass of its own over the same samples."""


class JudgedSamples:
    """`batches` and `reference` are what `accuracy.judge` takes, for any number of passes."""

    def __init__(self, batches: Batches, reference: Run, kept_bytes: int = KEPT_BYTES) -> None:
        self._batches = batches
        self._reference = reference
        self._room = kept_bytes
        self._kept: list[tuple[Mapping[str, Array], Array | None]] = []
        self._expected: dict[int, Mapping[str, Array]] = {}
        """By the identity of the kept feeds."""
        self._complete = False

    def batches(self) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        """What is kept, then the rest from where it comes."""
        yield from self._kept[:]
        if self._complete:
            return
        keeps = True
        for feeds, labels in islice(self._batches(), len(self._kept), None):
            keeps = keeps and self._keep(feeds, labels)
            yield feeds, labels
        self._complete = keeps

    def reference(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Of a batch that `batches` gave."""
        known = self._expected.get(id(feeds))
        return self._reference(feeds) if known is None else known

    def _keep(self, feeds: Mapping[str, Array], labels: Array | None) -> bool:
        expected = self._reference(feeds)
        size = sum(array.nbytes for values in (feeds, expected) for array in values.values())
        if size > self._room:
            return False
        self._room -= size
        self._kept.append((feeds, labels))
        self._expected[id(feeds)] = expected
        return True
