"""Judging candidates on a stream of samples: counts checked by hand, memory that does not grow with the stream."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from attn_deploy.accuracy import Run, judge, scores_output
from attn_deploy.parity import EXACT_DB, sqnr_db

Batch = tuple[Mapping[str, np.ndarray], np.ndarray | None]

# what the model is fed is what it gives: five samples of three classes, top-1 is 0 1 2 2 0
SCORES = np.array([[9, 1, 2], [1, 9, 2], [1, 2, 9], [1, 2, 9], [9, 2, 1]], np.float32)
LABELS = np.array([0, 1, 2, 0, 1])


def stream(*sizes: int, labels: np.ndarray | None = LABELS) -> Iterator[Batch]:
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        yield {"x": SCORES[part]}, None if labels is None else labels[part]
        start += size


def identity(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"scores": feeds["x"]}


def always(label: int) -> Run:
    """A model that always says `label`."""
    return lambda feeds: {"scores": np.eye(3, dtype=np.float32)[np.full(len(feeds["x"]), label)]}


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1)], ids=str)
def test_agreement_and_accuracy_are_those_counted_by_hand(sizes: tuple[int, ...]) -> None:
    judged = judge(stream(*sizes), identity, {"same": identity, "zero": always(0), "two": always(2)}, "scores")
    # the reference says 0 1 2 2 0: right three times of five
    by_hand = {"same": (1.0, 60.0), "zero": (0.4, 40.0), "two": (0.4, 20.0)}
    for name, (agreement, accuracy) in by_hand.items():
        found = judged[name]
        assert (found.samples, found.agreement) == (5, pytest.approx(agreement))
        assert found.accuracy is not None
        assert (found.accuracy.metric, found.accuracy.samples) == ("top1", 5)
        assert found.accuracy.value == pytest.approx(accuracy)
        assert found.accuracy.reference == pytest.approx(60.0)


def test_fidelity_is_that_of_all_samples_together() -> None:
    def rounded(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"scores": feeds["x"] * np.float32(1.01)}

    judged = judge(stream(2, 3), identity, {"same": identity, "rounded": rounded}, "scores")
    assert judged["same"].fidelity["scores"].sqnr_db == EXACT_DB
    assert judged["rounded"].fidelity["scores"].sqnr_db == pytest.approx(sqnr_db(SCORES, SCORES * np.float32(1.01)))


def test_without_labels_there_is_agreement_and_no_accuracy() -> None:
    (judgement,) = judge(stream(5, labels=None), identity, {"zero": always(0)}, "scores").values()
    assert judgement.agreement == pytest.approx(0.4)
    assert judgement.accuracy is None


def test_without_class_scores_there_is_fidelity_alone() -> None:
    (judgement,) = judge(stream(5), identity, {"same": identity}, None).values()
    assert (judgement.agreement, judgement.accuracy) == (None, None)
    assert judgement.fidelity["scores"].sqnr_db == EXACT_DB


def test_only_labelled_batches_count_for_accuracy() -> None:
    batches: list[Batch] = [({"x": SCORES[:2]}, LABELS[:2]), ({"x": SCORES[2:]}, None)]
    (judgement,) = judge(batches, identity, {"zero": always(0)}, "scores").values()
    assert judgement.samples == 5
    assert judgement.accuracy is not None
    assert (judgement.accuracy.samples, judgement.accuracy.value) == (2, 50.0)


def test_scores_that_are_not_numbers_are_never_the_top() -> None:
    def broken(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        scores = feeds["x"].copy()
        scores[:, 1] = np.nan
        return {"scores": scores}

    (judgement,) = judge(stream(5), identity, {"broken": broken}, "scores").values()
    # sample 2 (label 1) is lost; the others keep their top-1
    assert judgement.agreement == pytest.approx(0.8)
    assert judgement.fidelity["scores"].sqnr_db == -EXACT_DB


def test_an_empty_stream_gives_neither_agreement_nor_accuracy() -> None:
    (judgement,) = judge(stream(), identity, {"same": identity}, "scores").values()
    assert (judgement.samples, judgement.agreement, judgement.accuracy) == (0, None, None)


def test_every_candidate_sees_every_batch_once_and_progress_counts_samples() -> None:
    seen: list[int] = []
    calls = {"a": 0, "b": 0}

    def counting(name: str) -> Run:
        def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            calls[name] += 1
            return identity(feeds)

        return run

    judge(stream(2, 2, 1), identity, {"a": counting("a"), "b": counting("b")}, "scores", seen.append)
    assert seen == [2, 4, 5]
    assert calls == {"a": 3, "b": 3}


def test_memory_does_not_grow_with_the_stream() -> None:
    def long(batches: int) -> Iterator[Batch]:
        for number in range(batches):
            yield {"x": np.random.default_rng(number).standard_normal((4, 2000)).astype(np.float32)}, None

    def peak(batches: int) -> int:
        tracemalloc.start()
        judge(long(batches), identity, {"same": identity}, "scores")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(20) < 1.2 * peak(3)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"logits": ("batch", 10)}, "logits"),
        ({"features": ("batch", 7, 10), "logits": (2, 10), "other": (2, 5)}, "logits"),
        ({"score": ("batch", 1)}, None),
        ({"tokens": ("batch", "length")}, None),
        ({"features": ("batch", 3, 8, 8)}, None),
        ({}, None),
    ],
    ids=["scores", "the first of its shape", "one class", "a named length", "an image", "no output"],
)
def test_class_scores_are_the_first_output_of_batch_and_classes(
    shapes: dict[str, tuple[int | str, ...]], expected: str | None
) -> None:
    assert scores_output(shapes) == expected
