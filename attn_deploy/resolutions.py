"""Several resolutions in one bundle: `--input` given again for the same name asks for one more graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from attn_deploy.errors import AttnDeployError, UsageError
from attn_deploy.inputs import ExampleInput, describe_inputs, named_specs
from attn_deploy.receipt import MAIN
from attn_deploy.session import BATCH, DimBounds

Inputs = tuple[ExampleInput, ...]


def resolutions(given: Sequence[ExampleInput]) -> dict[str, Inputs]:
    """The inputs of each graph, by its name: `main` where no input was given more than once.

    Several inputs are matched by the order in which they were repeated; one that was given once has its shape in every
    graph. Raises UsageError: inputs repeated unequally often, of another rank or dtype, or twice in the same shape.
    """
    repeated: dict[str, list[ExampleInput]] = {}
    for item in given:
        repeated.setdefault(item.name, []).append(item)
    count = max(map(len, repeated.values()), default=1)
    if count == 1:
        return {MAIN: tuple(given)}
    if any(len(items) not in (1, count) for items in repeated.values()):
        raise UsageError(
            "the inputs are not given for the same number of resolutions",
            got=", ".join(f"{name} {len(items)} times" for name, items in repeated.items()),
            expected=f"every input {count} times, matched in their order, or once for all",
        )
    for items in repeated.values():
        _require_alike(items)
    found = [
        tuple(items[number] if len(items) > 1 else items[0] for items in repeated.values()) for number in range(count)
    ]
    names = graph_names(found)
    if len(set(names)) < count:
        twice = next(inputs for inputs, name in zip(found, names, strict=True) if names.count(name) > 1)
        raise UsageError(
            "the same shape is given twice", got=describe_inputs(twice), expected="another shape for every resolution"
        )
    return dict(zip(names, found, strict=True))


def require_one_resolution(given: Sequence[ExampleInput]) -> None:
    """Raises UsageError where an input stands twice: a source is looked at in one resolution."""
    names = [item.name for item in given]
    twice = [item for item in given if names.count(item.name) > 1]
    if twice:
        raise UsageError(
            f"input {twice[0].name!r} is given more than once", got=describe_inputs(twice), expected="one resolution",
            next_step="several resolutions are for attn-deploy export; its bundle can be given here",
        )  # fmt: skip


def _require_alike(items: Sequence[ExampleInput]) -> None:
    """Resolutions of one model differ in sizes alone."""
    first = items[0]
    for other in items[1:]:
        if len(other.shape) != len(first.shape):
            raise UsageError(
                f"the shapes of input {first.name!r} have different ranks",
                got=describe_inputs([first, other]),
                expected="resolutions of one model, which differ in sizes alone",
            )
        if other.dtype != first.dtype:
            raise UsageError(
                f"input {first.name!r} is given with several dtypes",
                got=describe_inputs([first, other]),
                expected="one dtype",
                next_step=f"write it with every shape: --input {other.name}=...:{first.dtype}",
            )


_PARTS: tuple[Callable[[tuple[int, ...]], tuple[int, ...]], ...] = (
    lambda shape: shape[2:] if len(shape) > 3 else shape[1:2],
    lambda shape: shape[1:],
    lambda shape: shape,
)
"""What of a shape names a graph, the shortest first: `224x224` of an image, 128 of a sequence; all but the batch;
everything."""


def graph_names(resolutions: Sequence[Inputs]) -> list[str]:
    """A name for each resolution from the sizes of the inputs that differ: `224x224`, `384x384`. Unique, unless a
    resolution stands there twice."""
    varying = [
        place
        for place, items in enumerate(zip(*resolutions, strict=True))
        if len({item.shape for item in items}) > 1
    ]  # fmt: skip
    names: list[str] = []
    for part in _PARTS:
        texts = [[_joined(part(inputs[place].shape)) for place in varying] for inputs in resolutions]
        names = ["-".join(dict.fromkeys(filter(None, parts))) for parts in texts]
        if len(set(names)) == len(names) and all(names):
            return names
    return names


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def require_different(graphs: Mapping[str, Sequence[ExampleInput]], dims: Mapping[str, DimBounds]) -> None:
    """Raises UsageError when two graphs differ only in what is dynamic anyway: a feed would fit both."""
    seen: dict[tuple[object, ...], str] = {}
    for name, inputs in graphs.items():
        specs = [s.shape for s in named_specs(inputs, dims)]
        key = tuple(specs) if BATCH in dims else (*specs, tuple(i.shape[:1] for i in inputs))
        if key in seen:
            raise UsageError(
                "two resolutions differ only in what is dynamic",
                got=f"{describe_inputs(graphs[seen[key]])} and {describe_inputs(inputs)}",
                expected=f"another size in a dimension beside {' and '.join(dims)}",
                next_step="leave one of them away: a single graph takes both",
            )
        seen[key] = name


@contextlib.contextmanager
def about(graph: str) -> Iterator[None]:
    """Errors of the block say which graph they are about, where there are several."""
    try:
        yield
    except AttnDeployError as error:
        if graph != MAIN:
            error.where = f"graph {graph}" + (f", {error.where}" if error.where else "")
        raise
