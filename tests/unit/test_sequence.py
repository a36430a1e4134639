"""A dynamic sequence: which inputs have one, how it is asked for, what is tried on it, and what a session refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attn_deploy.cli_arguments import dynamic_dims
from attn_deploy.errors import FeedError, UsageError
from attn_deploy.inputs import (
    ExampleInput,
    make_feeds,
    named_specs,
    narrowed,
    parse_input,
    sequence_inputs,
    sequence_length,
)
from attn_deploy.parity import other_length, parity_cases
from attn_deploy.session import DimBounds, FeedChecker

IDS = ExampleInput("ids", (1, 12), "int64", high=50)
MASK = ExampleInput("mask", (1, 12), "int64", mask=True)
BOTH = {"batch": DimBounds(), "sequence": DimBounds(2, 40)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"batch": DimBounds(1)}),
        (["batch"], {"batch": DimBounds(1)}),
        (["batch", "sequence"], {"batch": DimBounds(1), "sequence": DimBounds(2)}),
        (["batch,sequence"], {"batch": DimBounds(1), "sequence": DimBounds(2)}),
        (["batch=1:8", "sequence=4:64"], {"batch": DimBounds(1, 8), "sequence": DimBounds(4, 64)}),
        (["sequence=:64"], {"sequence": DimBounds(2, 64)}),
        (["sequence=1:"], {"sequence": DimBounds(1)}),
        (["none"], {}),
    ],
    ids=str,
)
def test_dynamic_dimensions_are_read_from_text(given: list[str] | None, expected: dict[str, DimBounds]) -> None:
    assert dynamic_dims(given) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["length"], "length"),
        (["batch", "none"], "none"),
        (["sequence", "sequence=2:8"], "sequence=2:8"),
        (["sequence=8:2"], "sequence=8:2"),
        (["sequence=a:b"], "sequence=a:b"),
    ],
    ids=str,
)
def test_what_is_no_dynamic_dimension_is_refused_by_name(given: list[str], named: str) -> None:
    with pytest.raises(UsageError, match="the dynamic dimension is not understood") as caught:
        dynamic_dims(given)
    assert caught.value.got == named


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["ids=1x12:int64", "mask=1x12:bool"], ("ids", "mask")),
        (["x=1x12x16"], ("x",)),
        (["x=1x12x16", "kind=1x12:int64"], ("x", "kind")),
        (["ids=1x12:int64", "weights=1x12"], ("ids", "weights")),
        (["ids=1x12:int64", "image=1x3x8x8", "count=1:int64"], ("ids",)),
        (["ids=1x12:int64", "spectrum=1x80x30"], ("ids",)),
    ],
    ids=str,
)
def test_the_sequence_is_the_second_dimension_of_these(inputs: list[str], expected: tuple[str, ...]) -> None:
    described = [parse_input(text) for text in inputs]
    assert sequence_inputs(described) == expected
    assert sequence_length(described) == 12


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        (["image=1x3x8x8"], "no input has a sequence"),
        (["x=1x16", "count=1:int64"], "no input has a sequence"),
        (["ids=1x12:int64", "answer=1x5:int64"], "sequences of several lengths"),
        (["a=1x12x16", "b=1x5x16"], "sequences of several lengths"),
    ],
    ids=str,
)
def test_inputs_without_one_sequence_are_refused(inputs: list[str], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        sequence_inputs([parse_input(text) for text in inputs])
    assert str(caught.value.got).startswith(inputs[0])
    assert "--dynamic batch" in str(caught.value.next_step)


def test_feeds_of_another_length_keep_every_other_size() -> None:
    inputs = [IDS, MASK, ExampleInput("x", (1, 12, 3)), ExampleInput("image", (1, 3, 8, 8))]
    shapes = {name: value.shape for name, value in make_feeds(inputs, batch=2, seed=0, sequence=5).items()}
    assert shapes == {"ids": (2, 5), "mask": (2, 5), "x": (2, 5, 3), "image": (2, 3, 8, 8)}


def test_specs_name_the_dimensions_that_are_dynamic() -> None:
    assert [s.shape for s in named_specs([IDS, MASK], BOTH)] == [("batch", "sequence")] * 2
    assert [s.shape for s in named_specs([IDS, MASK], {"batch": DimBounds()})] == [("batch", 12)] * 2


def test_bounds_that_the_model_narrowed_are_told() -> None:
    assert narrowed({"batch": DimBounds(), "sequence": DimBounds(2)}, BOTH) == [
        "the model takes a sequence of 2 to 40: so does the bundle"
    ]
    assert narrowed(BOTH, BOTH) == []


def lengths(bounds: DimBounds) -> dict[str, int]:
    cases = parity_cases([IDS, MASK], {"batch": DimBounds(), "sequence": bounds})
    assert all(case.feeds["ids"].shape == case.feeds["mask"].shape for case in cases)
    return {case.name: case.feeds["ids"].shape[1] for case in cases if "sequence" in case.name}


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (DimBounds(2), {"shortest sequence": 2, "shorter sequence": 7, "longer sequence": 19}),
        (DimBounds(4, 16), {"shortest sequence": 4, "shorter sequence": 7, "longer sequence": 16}),
        (DimBounds(2, 12), {"shortest sequence": 2, "shorter sequence": 7}),
        (DimBounds(12), {"longer sequence": 19}),
    ],
    ids=str,
)
def test_parity_is_tried_at_other_lengths_inside_the_bounds(bounds: DimBounds, expected: dict[str, int]) -> None:
    assert lengths(bounds) == expected


def test_parity_of_a_fixed_length_stays_at_the_example_s() -> None:
    cases = parity_cases([IDS, MASK], {"batch": DimBounds()})
    assert {case.feeds["ids"].shape[1] for case in cases} == {12}


@pytest.mark.parametrize(("bounds", "expected"), [(DimBounds(2), 19), (DimBounds(2, 14), 14), (DimBounds(2, 12), 7)])
def test_the_other_length_is_longer_where_the_bounds_allow_it(bounds: DimBounds, expected: int) -> None:
    assert other_length(12, bounds) == expected


def feed(ids: tuple[int, int], mask: tuple[int, int]) -> dict[str, Any]:
    return {"ids": np.zeros(ids, np.int64), "mask": np.ones(mask, np.int64)}


@pytest.mark.parametrize("length", [2, 7, 40])
def test_a_session_takes_every_length_inside_the_bounds(length: int) -> None:
    checked = FeedChecker(named_specs([IDS, MASK], BOTH), BOTH).check(feed((3, length), (3, length)))
    assert checked["ids"].shape == (3, length)


@pytest.mark.parametrize(
    ("feeds", "what", "advice"),
    [
        (feed((1, 41), (1, 41)), "'sequence' is out of the bundle's bounds", "shorten the sequence"),
        (feed((1, 1), (1, 1)), "'sequence' is out of the bundle's bounds", "--dynamic sequence=1:40"),
        (feed((1, 5), (1, 6)), "'sequence' differs between inputs", "the same sequence"),
    ],
    ids=["too long", "too short", "not the same"],
)
def test_a_session_refuses_other_lengths(feeds: dict[str, Any], what: str, advice: str) -> None:
    with pytest.raises(FeedError, match=what) as caught:
        FeedChecker(named_specs([IDS, MASK], BOTH), BOTH).check(feeds)
    assert advice in str(caught.value.next_step)
