"""Several resolutions from repeated inputs: how they are matched and named, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from attn_deploy.errors import UsageError
from attn_deploy.inputs import parse_input
from attn_deploy.preprocess import Preprocess, at_size
from attn_deploy.receipt import MAIN
from attn_deploy.resolutions import about, require_different, require_one_resolution, resolutions
from attn_deploy.session import DimBounds

BATCH = {"batch": DimBounds()}


def named(*texts: str) -> dict[str, list[tuple[int, ...]]]:
    """Graph -> the shapes of its inputs."""
    found = resolutions([parse_input(text) for text in texts])
    return {name: [item.shape for item in inputs] for name, inputs in found.items()}


@pytest.mark.parametrize("texts", [(), ("x=1x3x8x8",), ("x=1x3x8x8", "ids=1x9:int64")])
def test_inputs_given_once_are_the_main_graph(texts: Sequence[str]) -> None:
    assert list(named(*texts)) == [MAIN]


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (("x=1x3x224x224", "x=1x3x256x256"), ["224x224", "256x256"]),
        (("x=1x3x256x224", "x=1x3x224x224"), ["256x224", "224x224"]),
        (("ids=1x128:int64", "ids=1x256:int64"), ["128", "256"]),
        (("x=1x196x64", "x=1x49x64"), ["196", "49"]),
        (("x=1x3x8x64x64", "x=1x3x16x64x64"), ["8x64x64", "16x64x64"]),
        (("x=1x3x8x8", "x=1x4x8x8"), ["3x8x8", "4x8x8"]),
        (("x=1x3x8x8", "x=2x3x8x8"), ["1x3x8x8", "2x3x8x8"]),
        (("x=1x3x8x8", "x=1x3x9x9", "x=1x3x10x10"), ["8x8", "9x9", "10x10"]),
    ],
)
def test_a_graph_is_named_after_the_sizes_that_tell_it_from_the_others(texts: Sequence[str], names: list[str]) -> None:
    assert list(named(*texts)) == names


def test_several_inputs_are_matched_in_the_order_of_their_repetition() -> None:
    found = named("x=1x3x32x32", "ids=1x8:int64", "ids=1x16:int64", "x=1x3x64x64")
    assert found == {"32x32-8": [(1, 3, 32, 32), (1, 8)], "64x64-16": [(1, 3, 64, 64), (1, 16)]}


def test_an_input_given_once_keeps_its_shape_in_every_graph_and_names_none() -> None:
    found = named("x=1x3x32x32", "ids=1x8:int64", "x=1x3x64x64")
    assert found == {"32x32": [(1, 3, 32, 32), (1, 8)], "64x64": [(1, 3, 64, 64), (1, 8)]}


def test_inputs_that_move_together_are_named_once() -> None:
    assert list(named("left=1x3x8x8", "right=1x3x8x8", "left=1x3x9x9", "right=1x3x9x9")) == ["8x8", "9x9"]


@pytest.mark.parametrize(
    ("texts", "what", "got"),
    [
        (("x=1x8", "x=1x9", "y=1x8", "y=1x9", "y=1x10"), "not given for the same number", "x 2 times, y 3 times"),
        (("x=1x3x8x8", "x=1x3x8x8"), "the same shape is given twice", "--input x=1x3x8x8:float32"),
        (("x=1x8", "x=1x9", "x=1x8"), "the same shape is given twice", "--input x=1x8:float32"),
        (("x=1x3x8x8", "x=1x3x8"), "have different ranks", "x=1x3x8:float32"),
        (("ids=1x8:int64", "ids=1x9"), "with several dtypes", "ids=1x9:float32"),
    ],
)
def test_what_makes_no_resolutions_is_refused(texts: Sequence[str], what: str, got: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        named(*texts)
    assert got in str(caught.value.got)
    assert caught.value.expected is not None


@pytest.mark.parametrize(
    ("texts", "dims", "apart"),
    [
        (("x=1x3x8x8", "x=1x3x9x9"), BATCH, True),
        (("x=1x3x8x8", "x=2x3x8x8"), BATCH, False),
        (("x=1x3x8x8", "x=2x3x8x8"), {}, True),
        (("ids=1x8:int64", "ids=1x16:int64"), BATCH, True),
        (("ids=1x8:int64", "ids=1x16:int64"), {**BATCH, "sequence": DimBounds(2)}, False),
    ],
)
def test_resolutions_must_differ_in_what_is_not_dynamic(
    texts: Sequence[str], dims: dict[str, DimBounds], apart: bool
) -> None:
    found = resolutions([parse_input(text) for text in texts])
    if apart:
        require_different(found, dims)
        return
    with pytest.raises(UsageError, match="differ only in what is dynamic") as caught:
        require_different(found, dims)
    assert all(text.split(":")[0] in str(caught.value.got) for text in texts)


def test_a_source_is_looked_at_in_one_resolution() -> None:
    require_one_resolution([parse_input("x=1x8"), parse_input("y=1x8")])
    with pytest.raises(UsageError, match="input 'x' is given more than once"):
        require_one_resolution([parse_input("x=1x8"), parse_input("x=1x9")])


@pytest.mark.parametrize(
    ("graph", "where", "told"),
    [("8x8", None, "graph 8x8"), ("8x8", "module a.b", "graph 8x8, module a.b"), (MAIN, "module a.b", "module a.b")],
)
def test_an_error_names_its_graph_where_there_are_several(graph: str, where: str | None, told: str) -> None:
    with pytest.raises(UsageError) as caught, about(graph):
        raise UsageError("it fails", where=where)
    assert caught.value.where == told


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        (248, (256, 256), 283),
        (248, (448, 336), 372),
        (None, (256, 256), None),
        ((248, 248), (448, 112), (496, 124)),
    ],
)
def test_images_are_resized_in_the_same_ratio_to_another_crop(
    resize: int | tuple[int, int] | None, size: tuple[int, int], expected: int | tuple[int, int] | None
) -> None:
    config = Preprocess("x", (224, 224), resize=resize, mean=(0.1, 0.2, 0.3))
    found = at_size(config, *size)
    assert (found.crop, found.resize, found.mean) == (size, expected, config.mean)
    assert at_size(config, 224, 224) == config
