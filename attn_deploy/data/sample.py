"""One sample, and the check that it is what the model takes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_deploy.errors import FeedError, UsageError
from attn_deploy.session import Array, FeedChecker, TensorSpec


@dataclass(frozen=True)
class Sample:
    """`feeds` holds one array per model input, without the batch dimension; `label` is a class index."""

    key: str
    feeds: dict[str, Array]
    label: int | None


@dataclass(frozen=True)
class Unreadable:
    """A sample that was passed over, and why."""

    key: str
    reason: str


class SampleChecker:
    """Checks samples against the model's inputs without their batch dimension, and labels against the label list."""

    def __init__(self, inputs: Sequence[TensorSpec], labels: Sequence[str] | None) -> None:
        self.specs = tuple(TensorSpec(spec.name, spec.dtype, spec.shape[1:]) for spec in inputs)
        self._feeds = FeedChecker(self.specs, {})
        self._label_count = None if labels is None else len(labels)

    def check(self, key: str, feeds: Mapping[str, Any], label: object, where: str) -> Sample:
        """The sample. Raises UsageError naming `where` and the key: names, dtype, shape, NaN, label."""
        place = f"{where}, sample {key}"
        try:
            arrays = self._feeds.check(feeds)
        except FeedError as error:
            what = f"a sample is not what the model takes (one sample, without the batch dimension): {error.what}"
            raise UsageError(
                what, where=place, got=error.got, expected=error.expected, next_step=error.next_step
            ) from error
        for name, array in arrays.items():
            if array.dtype.kind in "fc" and np.isnan(array).any():
                raise UsageError(
                    f"a sample holds NaN in input {name!r}",
                    where=place,
                    got=f"{int(np.isnan(array).sum())} of {array.size} values are NaN",
                    expected="numbers",
                )
        return Sample(key, arrays, None if label is None else self.check_label(label, place))

    def check_label(self, label: object, place: str) -> int:
        """`label` as a class index. Raises UsageError when it is not one, or not one of the label list."""
        try:
            if isinstance(label, bool | np.bool_):
                raise TypeError
            index = operator.index(label)  # type: ignore[arg-type]
        except TypeError:
            raise UsageError(
                "a label is not a class index",
                where=place,
                got=f"{label!r} ({type(label).__name__})",
                expected="an integer of 0 or more, or None",
            ) from None
        if index < 0 or (self._label_count is not None and index >= self._label_count):
            last = "more" if self._label_count is None else str(self._label_count - 1)
            raise UsageError(
                "a label is out of range",
                where=place,
                got=index,
                expected=f"0 to {last}" if self._label_count is not None else "0 or more",
                next_step=None if self._label_count is None else f"the label list has {self._label_count} names",
            )
        return index
