"""Errors: one exit code per class, and all a user needs in the text."""

from __future__ import annotations

import copy
import pickle

import pytest

from attn_deploy import errors
from attn_deploy.errors import (
    AttnDeployError,
    BundleError,
    CaptureError,
    FeedError,
    NotAsAskedError,
    ParityError,
    StorageError,
    TooSlowError,
    UnavailableError,
    UsageError,
)

EXIT_CODES = {
    AttnDeployError: 1,
    StorageError: 1,
    UsageError: 2,
    CaptureError: 2,
    BundleError: 2,
    FeedError: 2,
    ParityError: 3,
    NotAsAskedError: 4,
    TooSlowError: 5,
    UnavailableError: 6,
}


def all_classes(root: type[AttnDeployError] = AttnDeployError) -> set[type[AttnDeployError]]:
    return {root}.union(*(all_classes(c) for c in root.__subclasses__() if c.__module__ == errors.__name__))


def test_every_class_has_a_documented_exit_code() -> None:
    assert {c: c.exit_code for c in all_classes()} == EXIT_CODES


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_way_from_a_child_process(kind: type[AttnDeployError]) -> None:
    """Pickled by multiprocessing: class and every part stay."""
    error = kind("it broke", got=3, expected="4", next_step="try again", where="model.onnx")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (twin.what, twin.details(), str(twin)) == (error.what, error.details(), str(error))


def test_text_shows_every_part_in_order() -> None:
    error = UsageError("it broke", got=[1, 2], expected="one number", next_step="pass 1", where="x.json")
    assert str(error) == "it broke\n  where: x.json\n  got: [1, 2]\n  expected: one number\n  next: pass 1"


def test_text_leaves_out_what_is_not_known() -> None:
    assert str(UsageError("it broke")) == "it broke"
    assert UsageError("it broke", expected="2").details() == [("expected", "2")]


@pytest.mark.parametrize("value", [0, "", False, 0.0, []], ids=repr)
def test_a_value_that_is_falsy_is_still_shown(value: object) -> None:
    assert UsageError("too few", got=value).details() == [("got", str(value))]
