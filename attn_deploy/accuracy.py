"""Accuracy and agreement on the user's data: one pass for all candidates, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from attn_deploy.parity import Moments
from attn_deploy.receipt import Accuracy, Fidelity
from attn_deploy.session import Array

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass
class _Tally:
    agreed: int = 0
    correct: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """One candidate on the judged samples. `agreement` (share of equal top-1) is None without class scores."""

    samples: int
    agreement: float | None
    accuracy: Accuracy | None
    fidelity: dict[str, Fidelity]
    """By output name."""


def scores_output(shapes: Mapping[str, Sequence[int | str]]) -> str | None:
    """The output that holds class scores: the first of shape [batch, classes] with more than one class."""
    for name, shape in shapes.items():
        if len(shape) == 2 and isinstance(shape[1], int) and shape[1] > 1:
            return name
    return None


def judge(
    batches: Iterable[tuple[Mapping[str, Array], Array | None]],
    reference: Run,
    candidates: Mapping[str, Run],
    scores: str | None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Judgement]:
    """Runs the reference and every candidate on each batch (feeds, labels or None) of the stream.

    Returns judgements by candidate id. Only counts and sums are kept.
    """
    tallies = {name: _Tally() for name in candidates}
    samples = labelled = reference_correct = 0
    for feeds, labels in batches:
        expected = reference(feeds)
        count = len(next(iter(feeds.values())))
        samples += count
        top1 = expected[scores].argmax(axis=1) if scores is not None else None
        if labels is not None and top1 is not None:
            labelled += count
            reference_correct += int((top1 == labels).sum())
        for name, run in candidates.items():
            _tally(tallies[name], expected, run(feeds), scores, top1, labels)
        if progress is not None:
            progress(samples)
    return {name: _judgement(tally, samples, labelled, reference_correct, scores) for name, tally in tallies.items()}


def _tally(
    tally: _Tally,
    expected: Mapping[str, Array],
    got: Mapping[str, Array],
    scores: str | None,
    top1: Array | None,
    labels: Array | None,
) -> None:
    for name, value in expected.items():
        tally.moments.setdefault(name, Moments()).add(value, got[name])
    if top1 is not None and scores is not None:
        own = np.nan_to_num(got[scores], nan=-np.inf).argmax(axis=1)
        tally.agreed += int((own == top1).sum())
        if labels is not None:
            tally.correct += int((own == labels).sum())


def _judgement(tally: _Tally, samples: int, labelled: int, reference_correct: int, scores: str | None) -> Judgement:
    accuracy = None
    if labelled:
        accuracy = Accuracy(
            metric="top1",
            value=100.0 * tally.correct / labelled,
            reference=100.0 * reference_correct / labelled,
            samples=labelled,
        )
    return Judgement(
        samples=samples,
        agreement=tally.agreed / samples if scores is not None and samples else None,
        accuracy=accuracy,
        fidelity={name: moments.fidelity() for name, moments in tally.moments.items()},
    )
