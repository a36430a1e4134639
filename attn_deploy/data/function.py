"""`package.module:function`: a function of the user's that yields (feeds, label)."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from attn_deploy.data.sample import Sample, SampleChecker
from attn_deploy.errors import UsageError
from attn_deploy.session import TensorSpec
from attn_deploy.target import nearest

SHAPE_OF_YIELD = "(feeds, label): a dict of input name -> array of one sample without its batch dimension; int or None"


class SampleFunction:
    """The function is called anew, without arguments, for every pass, and samples are keyed by their index.

    It has to yield the same samples in the same order on each call, or calibration and judgement would overlap and
    two passes could not be compared: the first sample of each pass is held against the first one ever seen.
    """

    def __init__(self, spec: str, *, inputs: Sequence[TensorSpec], labels: Sequence[str] | None) -> None:
        self._spec = spec
        self._function = import_object(spec)
        self._checker = SampleChecker(inputs, labels)
        if not callable(self._function):
            raise self._error("the data source is not a function", got=type(self._function).__name__)
        first = next(self._checked(), None)
        if first is None:
            raise self._error("the data function yields nothing", got="no sample", expected=SHAPE_OF_YIELD)
        self.labelled = first.label is not None
        self._first_digest = _digest(first)
        self.description = f"samples of {spec}"

    def samples(self, wanted: Container[str]) -> Iterator[Sample]:
        """The wanted samples in the order of the function."""
        for sample in self._checked():
            if sample.key == "0" and _digest(sample) != self._first_digest:
                raise self._error(
                    "the data function yields other samples each time it is called",
                    got="a first sample that differs from the first one of an earlier call",
                    expected="the same samples in the same order",
                    next_step="seed its random numbers inside the function, and leave out shuffling and augmentation",
                )
            if (sample.label is not None) != self.labelled:
                raise self._error(
                    "the data function yields some samples with a label and some without",
                    got=f"label {sample.label} at sample {sample.key}",
                    expected="a label, as at sample 0" if self.labelled else "None, as at sample 0",
                )
            if sample.key in wanted:
                yield sample

    def _checked(self) -> Iterator[Sample]:
        for index, item in enumerate(self._items()):
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Mapping)):
                got = f"{type(item).__name__} at sample {index}"
                raise self._error("the data function yields something else", got=got, expected=SHAPE_OF_YIELD)
            yield self._checker.check(str(index), item[0], item[1], self._spec)

    def _items(self) -> Iterator[Any]:
        """What one call yields; an exception inside it becomes a UsageError that carries it."""
        index = -1
        try:
            for index, item in enumerate(self._function()):  # noqa: B007  (read in the handler)
                yield item
        except Exception as error:
            raise self._error(
                f"the data function failed after {index + 1} samples",
                got=f"{type(error).__name__}: {error}",
                expected=f"an iterable of {SHAPE_OF_YIELD}, from a call without arguments",
            ) from error

    def _error(self, what: str, *, got: str, expected: str | None = None, next_step: str | None = None) -> UsageError:
        return UsageError(what, where=self._spec, got=got, expected=expected, next_step=next_step)


def import_object(spec: str) -> Callable[[], Any]:
    """`package.module:name` -> the object; modules of the current folder are found after the installed ones.

    Raises UsageError when the module cannot be imported or has no such name.
    """
    module_name, _, name = spec.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise UsageError(
            f"module {module_name!r} cannot be imported",
            where=spec,
            got=f"{type(error).__name__}: {error}",
            expected="package.module:function, importable from here",
            next_step=f"run from the folder that holds it, or check: python -c 'import {module_name}'",
        ) from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UsageError(
            f"module {module_name!r} has no {name!r}",
            where=spec,
            got=name,
            expected=nearest(name, public) if public else "a module with public names; it has none",
        )
    return getattr(module, name)  # type: ignore[no-any-return]


def _digest(sample: Sample) -> bytes:
    digest = hashlib.sha256(str(sample.label).encode())
    for name in sorted(sample.feeds):
        digest.update(np.ascontiguousarray(sample.feeds[name]).tobytes())
    return digest.digest()
