"""Options of an engine as text, its optimization profiles, and which of them runs which batch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_deploy.errors import FeedError, UsageError
from attn_deploy.runtimes.tensorrt_options import (
    Range,
    batch_parts,
    check_sizes,
    choose_profile,
    dynamic_dims,
    is_batched,
    parse,
    profile_options,
    profiles_of,
    ranges_within,
    shape_within,
    sizes_of,
)
from attn_deploy.session import DimBounds, TensorSpec

IMAGE = TensorSpec("x", "float32", ("batch", 3, 224, 224))
TOKENS = TensorSpec("ids", "int64", ("batch", "sequence"))
SCORES = TensorSpec("y", "float32", ("batch", 1000))


def test_defaults_are_those_of_the_documentation() -> None:
    options = parse({})
    assert (options.optimization_level, options.workspace_mb) == (3, 4096)
    assert not options.version_compatible
    assert options.hardware_compatible == "none"
    assert not options.tf32
    assert options.cuda_graph


def test_ranges_of_a_dimension_are_parsed() -> None:
    assert parse({"profile:batch": "1,1,1; 2,8,32"}).ranges == {"batch": (Range(1, 1, 1), Range(2, 8, 32))}


@pytest.mark.parametrize(
    "text", ["", "1", "1,2", "1,2,3,4", "2,1,3", "1,4,3", "0,1,2", "-1,1,2", "a,b,c", "1,2,3;", "1.5,2,3", "1,2,²"]
)
def test_a_wrong_range_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse({"profile:batch": text})
    assert "profile:batch" in error.value.what
    assert error.value.got == text
    assert "min <= opt <= max" in str(error.value.expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tf32", "yes"), ("cuda_graph", "2"), ("optimization_level", "6"), ("workspace_mb", "0"), ("workspace_mb", "-1"),
     ("hardware_compatible", "ampere"), ("optimization_level", "")],
)  # fmt: skip
def test_a_wrong_value_is_refused(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=name):
        parse({name: text})


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError) as error:
        parse({"optimisation_level": "5"})
    assert "optimization_level" in str(error.value.expected)


def test_batch_one_has_a_profile_of_its_own() -> None:
    assert ranges_within("batch", DimBounds(1, 64)) == (Range(1, 1, 1), Range(2, 32, 64))


@pytest.mark.parametrize(
    ("dim", "bounds", "expected"),
    [
        ("batch", DimBounds(1, None), (Range(1, 1, 1), Range(2, 32, 128))),
        ("batch", DimBounds(1, 1), (Range(1, 1, 1),)),
        ("batch", DimBounds(1, 2), (Range(1, 1, 1), Range(2, 2, 2))),
        ("batch", DimBounds(4, 8), (Range(4, 8, 8),)),
        ("batch", DimBounds(256, None), (Range(256, 256, 256),)),
        ("sequence", DimBounds(1, None), (Range(1, 128, 512),)),
        ("sequence", DimBounds(1, 64), (Range(1, 64, 64),)),
        ("frames", DimBounds(1, None), (Range(1, 128, 1024),)),
    ],
)
def test_ranges_cover_the_bounds(dim: str, bounds: DimBounds, expected: tuple[Range, ...]) -> None:
    assert ranges_within(dim, bounds) == expected


@given(low=st.integers(1, 300), more=st.integers(0, 300) | st.none(), dim=st.sampled_from(["batch", "sequence", "t"]))
def test_ranges_of_any_bounds_are_whole_and_survive_as_text(low: int, more: int | None, dim: str) -> None:
    bounds = DimBounds(low, None if more is None else low + more)
    ranges = ranges_within(dim, bounds)
    assert ranges[0].min == low
    assert bounds.max is None or ranges[-1].max == bounds.max
    assert all(r.min <= r.opt <= r.max for r in ranges)
    assert all(b.min == a.max + 1 for a, b in itertools.pairwise(ranges))
    assert parse(profile_options({dim: bounds})).ranges[dim] == ranges


def test_profiles_are_all_combinations() -> None:
    options = parse({"profile:batch": "1,1,1;2,8,32", "profile:sequence": "1,128,384"})
    found = profiles_of(options, [TOKENS])
    assert found == (
        {"batch": Range(1, 1, 1), "sequence": Range(1, 128, 384)},
        {"batch": Range(2, 8, 32), "sequence": Range(1, 128, 384)},
    )


def test_a_model_without_dynamic_dimensions_has_one_profile() -> None:
    fixed = TensorSpec("x", "float32", (1, 3, 8, 8))
    assert profiles_of(parse({}), [fixed]) == ({},)
    assert choose_profile(({},), {}) == 0
    assert check_sizes(({},), {}, batched=False) == [1]


def test_too_many_profiles_are_refused() -> None:
    options = parse({"profile:batch": "1,1,1;2,2,2;3,3,3", "profile:sequence": "1,1,1;2,2,2;3,3,3"})
    with pytest.raises(UsageError, match="too many"):
        profiles_of(options, [TOKENS])


def test_shapes_at_the_ends_of_a_profile() -> None:
    profile = {"batch": Range(1, 8, 32), "sequence": Range(4, 128, 512)}
    assert [shape_within(TOKENS, profile, which) for which in ("min", "opt", "max")] == [(1, 4), (8, 128), (32, 512)]
    assert shape_within(IMAGE, profile, "max") == (32, 3, 224, 224)
    assert dynamic_dims([IMAGE, TOKENS]) == ["batch", "sequence"]
    assert sizes_of([IMAGE, TOKENS], {"x": (7, 3, 224, 224), "ids": (7, 9)}) == {"batch": 7, "sequence": 9}


PROFILES = ({"batch": Range(1, 1, 1)}, {"batch": Range(2, 8, 16)}, {"batch": Range(1, 32, 64)})


@pytest.mark.parametrize(("batch", "index"), [(1, 0), (2, 1), (8, 1), (16, 1), (17, 2), (64, 2), (65, None)])
def test_the_profile_with_the_nearest_optimum_runs(batch: int, index: int | None) -> None:
    assert choose_profile(PROFILES, {"batch": batch}) == index


@pytest.mark.parametrize(
    ("batch", "parts"), [(64, [64]), (65, [64, 1]), (128, [64, 64]), (200, [64, 64, 64, 8]), (1, [1])]
)
def test_a_batch_beyond_the_profiles_runs_in_parts(batch: int, parts: list[int]) -> None:
    assert check_sizes(PROFILES, {"batch": batch}, batched=True) == parts


def test_a_rest_below_every_profile_makes_the_parts_equal() -> None:
    only = ({"batch": Range(4, 8, 8)},)
    assert batch_parts(only, {"batch": 9}, batched=True) == [5, 4]
    assert batch_parts(only, {"batch": 3}, batched=True) is None
    narrow = ({"batch": Range(7, 8, 8)},)
    assert batch_parts(narrow, {"batch": 9}, batched=True) is None


@given(batch=st.integers(1, 3000), least=st.integers(1, 4), most=st.integers(4, 70))
def test_parts_are_the_batch_and_each_is_in_a_profile(batch: int, least: int, most: int) -> None:
    held = ({"batch": Range(least, most, most)},)
    parts = batch_parts(held, {"batch": batch}, batched=True)
    if parts is None:
        assert batch < least or batch > most
    else:
        assert sum(parts) == batch
        assert all(part in held[0]["batch"] for part in parts)
        assert parts[0] == max(parts)


def test_a_batch_is_not_split_where_samples_depend_on_each_other() -> None:
    with pytest.raises(FeedError, match="'batch'") as error:
        check_sizes(PROFILES, {"batch": 65}, batched=False)
    assert error.value.got == "65"
    assert error.value.expected == "1 to 1, 2 to 16, 1 to 64"


def test_another_dimension_is_never_split() -> None:
    held = ({"batch": Range(1, 8, 32), "sequence": Range(1, 128, 512)},)
    with pytest.raises(FeedError, match="'sequence'") as error:
        check_sizes(held, {"batch": 4, "sequence": 513}, batched=True)
    assert "--dynamic sequence=" in str(error.value.next_step)


def test_sizes_that_fit_only_in_different_profiles_are_refused() -> None:
    held = (
        {"batch": Range(1, 1, 1), "sequence": Range(1, 512, 512)},
        {"batch": Range(2, 8, 8), "sequence": Range(1, 128, 128)},
    )
    with pytest.raises(FeedError, match="together"):
        check_sizes(held, {"batch": 4, "sequence": 500}, batched=False)
    assert check_sizes(held, {"batch": 4, "sequence": 500}, batched=True) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("inputs", "outputs", "batched"),
    [
        ([IMAGE], [SCORES], True),
        ([TOKENS], [SCORES], True),
        ([IMAGE], [TensorSpec("y", "float32", (1000,))], False),
        ([IMAGE], [TensorSpec("y", "float32", ("batch", "batch"))], False),
        ([IMAGE, TensorSpec("scale", "float32", (1,))], [SCORES], False),
    ],
)
def test_samples_are_independent_where_the_batch_is_the_first_axis_of_all(
    inputs: list[TensorSpec], outputs: list[TensorSpec], batched: bool
) -> None:
    assert is_batched(inputs, outputs) is batched
