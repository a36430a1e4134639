"""Descriptions of inputs as text, and the example feeds that are made from them."""

from __future__ import annotations

import numpy as np
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.inputs import ExampleInput, describe_inputs, feeds_batch, make_feeds, override, parse_input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1x3x224x224", ExampleInput("x", (1, 3, 224, 224))),
        ("x=7", ExampleInput("x", (7,))),
        ("ids=1x128:int64", ExampleInput("ids", (1, 128), "int64")),
        ("ids=1x128:int64:30522", ExampleInput("ids", (1, 128), "int64", high=30522)),
        ("pixel_values=2x3x8x8:float16", ExampleInput("pixel_values", (2, 3, 8, 8), "float16")),
    ],
)
def test_an_input_is_read_from_text(text: str, expected: ExampleInput) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    "text", ["", "1x3", "x=", "x=1x", "x=1,3", "x=-1x3", "x=1X3", "x=1x3:", "x=1x3:int64:", "1x=1x3", "x=1x3 "]
)
def test_text_that_is_no_input_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert caught.value.got == text
    assert "x=1x3x224x224" in str(caught.value.expected)


def test_an_unknown_dtype_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown dtype") as caught:
        parse_input("x=1x3:float8")
    assert "float32" in str(caught.value.expected)


def test_an_empty_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match="empty dimension"):
        parse_input("x=1x0x3")


def test_a_description_reads_back_as_the_same_input() -> None:
    item = ExampleInput("ids", (1, 128), "int64")
    assert parse_input(item.describe()) == item
    assert describe_inputs([item, ExampleInput("x", (2, 3))]) == "--input ids=1x128:int64 --input x=2x3:float32"


SOURCE = (ExampleInput("ids", (1, 16), "int64", low=1, high=1000), ExampleInput("mask", (1, 16), "int64", mask=True))


def test_a_new_shape_keeps_what_the_source_knows() -> None:
    ids, mask = override(SOURCE, [parse_input("ids=1x32:int64"), parse_input("mask=1x32:int64")])
    assert (ids.shape, ids.low, ids.high) == ((1, 32), 1, 1000)
    assert mask.mask


@pytest.mark.parametrize("high", [2, 3, 50])
def test_a_range_that_is_given_replaces_the_source_s(high: int) -> None:
    ids, _ = override(SOURCE, [parse_input(f"ids=1x16:int64:{high}")])
    assert ids.high == high


def test_another_dtype_replaces_the_whole_input() -> None:
    ids, _ = override(SOURCE, [parse_input("ids=1x16:float32")])
    assert ids == ExampleInput("ids", (1, 16), "float32")


def test_an_input_that_the_source_lacks_is_added_behind_its_own() -> None:
    assert [i.name for i in override(SOURCE, [parse_input("extra=1x2")])] == ["ids", "mask", "extra"]


DTYPES = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_feeds_have_the_asked_shape_and_dtype_and_are_not_constant(dtype: str) -> None:
    feeds = make_feeds([ExampleInput("x", (1, 5, 7), dtype)], batch=3, seed=0)
    assert feeds["x"].shape == (3, 5, 7)
    assert feeds["x"].dtype == dtype
    assert feeds["x"].min() != feeds["x"].max()


def test_feeds_follow_from_the_seed_alone() -> None:
    first, again, other = (make_feeds(SOURCE, batch=2, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["ids"], other["ids"])


def test_no_batch_keeps_the_shape() -> None:
    assert make_feeds([ExampleInput("x", (4, 5))], batch=None, seed=0)["x"].shape == (4, 5)


def test_a_scalar_input_has_no_batch() -> None:
    feeds = make_feeds([ExampleInput("t", ())], batch=3, seed=0)
    assert feeds["t"].shape == ()
    assert feeds_batch(feeds) == 1


def test_feeds_batch_is_the_first_dimension() -> None:
    assert feeds_batch(make_feeds(SOURCE, batch=3, seed=0)) == 3


def test_integers_fill_their_range_and_stay_inside() -> None:
    values = make_feeds([ExampleInput("ids", (1, 1000), "int64", low=3, high=8)], batch=4, seed=0)["ids"]
    assert set(np.unique(values)) == {3, 4, 5, 6, 7}


def test_integers_without_a_range_are_zero_and_one() -> None:
    values = make_feeds([ExampleInput("ids", (1, 100), "int64")], batch=4, seed=0)["ids"]
    assert set(np.unique(values)) == {0, 1}


def test_masks_are_ones_that_end_in_zeros_and_never_empty() -> None:
    mask = make_feeds([ExampleInput("mask", (1, 16), "int64", mask=True)], batch=32, seed=0)["mask"]
    assert (np.diff(mask, axis=1) <= 0).all()
    lengths = mask.sum(axis=1)
    assert lengths.min() >= 8
    assert lengths.max() <= 16
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 10.0])
def test_magnitude_is_the_standard_deviation_of_floats(magnitude: float) -> None:
    x = make_feeds([ExampleInput("x", (1, 10_000))], batch=4, seed=0, magnitude=magnitude)["x"]
    assert x.std() == pytest.approx(magnitude, rel=0.05)
    assert x.mean() == pytest.approx(0.0, abs=0.05 * magnitude)
