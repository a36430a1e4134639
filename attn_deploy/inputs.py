"""Descriptions of a model's inputs, and example feeds made from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attn_deploy.errors import UsageError
from attn_deploy.session import BATCH, SEQUENCE, Array, DimBounds, TensorSpec

FLOATS = ("float32", "float64", "float16")


@dataclass(frozen=True)
class ExampleInput:
    """One input of the model: `shape` includes the batch as its first dimension.

    Floats are drawn from a normal distribution, integers from [low, high), where `high` None is 2, and `mask` gives
    rows of ones that end in zeros, as attention masks of padded text do.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    low: int = 0
    high: int | None = None
    mask: bool = False

    def describe(self) -> str:
        return f"{self.name}={'x'.join(str(d) for d in self.shape)}:{self.dtype}"


_INPUT = re.compile(r"^(?P<name>[A-Za-z_]\w*)=(?P<shape>\d+(x\d+)*)(:(?P<dtype>[a-z]+\d*)(:(?P<high>\d+))?)?$")
_DTYPES = (*FLOATS, "int64", "int32", "uint8", "bool")


def parse_input(text: str) -> ExampleInput:
    """`x=1x3x224x224`, `ids=1x128:int64` or `ids=1x128:int64:30522` (values below 30522)."""
    match = _INPUT.match(text)
    if match is None:
        raise UsageError(
            "an input is not understood",
            got=text,
            expected="NAME=DIMxDIM...[:DTYPE[:BELOW]], for example x=1x3x224x224 or ids=1x128:int64:30522",
        )
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise UsageError("an input has an unknown dtype", got=text, expected="one of " + ", ".join(_DTYPES))
    shape = tuple(int(d) for d in match["shape"].split("x"))
    if 0 in shape:
        raise UsageError("an input has an empty dimension", got=text, expected="every dimension at least 1")
    return ExampleInput(match["name"], shape, dtype, high=int(match["high"]) if match["high"] else None)


def override(inputs: Sequence[ExampleInput], given: Sequence[ExampleInput]) -> tuple[ExampleInput, ...]:
    """The source's inputs with the user's shapes and dtypes; a range the user did not give is kept."""
    known = {i.name: i for i in inputs}
    result = dict(known)
    for new in given:
        old = known.get(new.name)
        if old is not None and old.dtype == new.dtype:
            result[new.name] = replace(old, shape=new.shape, high=old.high if new.high is None else new.high)
        else:
            result[new.name] = new
    return tuple(result.values())


def make_feeds(
    inputs: Sequence[ExampleInput], *, batch: int | None, seed: int, magnitude: float = 1.0,
    sequence: int | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Feeds by name, deterministic in `seed`. `batch` replaces the first dimension, `sequence` the second one of the
    inputs in `sequence_inputs`; None keeps it.

    `magnitude` is the standard deviation of float inputs.
    """
    rng = np.random.default_rng(seed)
    along = sequence_inputs(inputs) if sequence is not None else ()
    feeds: dict[str, Array] = {}
    for item in inputs:
        shape = item.shape if batch is None or not item.shape else (batch, *item.shape[1:])
        if sequence is not None and item.name in along:
            shape = (shape[0], sequence, *shape[2:])
        feeds[item.name] = _draw(item, shape, rng, magnitude)
    return feeds


def sequence_inputs(inputs: Sequence[ExampleInput]) -> tuple[str, ...]:
    """Names of the inputs whose second dimension is the sequence.

    Integers and booleans of rank 2 or more ([batch, sequence] token ids and masks), and with them every float input of
    rank 2 or 3 that is as long as they are. Without integers: every float input [batch, sequence, channels].
    Raises UsageError when there is none, or when they differ in length.
    """
    discrete = [i for i in inputs if i.dtype not in FLOATS and len(i.shape) >= 2]
    lengths = {i.shape[1] for i in discrete}
    floats = [i for i in inputs if i.dtype in FLOATS]
    if discrete:
        found = discrete + [i for i in floats if len(i.shape) in (2, 3) and i.shape[1] in lengths]
    else:
        found = [i for i in floats if len(i.shape) == 3]
    if len({i.shape[1] for i in found}) > 1:
        raise UsageError(
            "the inputs have sequences of several lengths",
            got=", ".join(i.describe() for i in found),
            expected="one sequence length, as the second dimension of each of them",
            next_step="give them one length with --input, or leave --dynamic sequence away: --dynamic batch",
        )
    if not found:
        raise UsageError(
            "no input has a sequence",
            got=", ".join(i.describe() for i in inputs),
            expected="an integer or boolean input [batch, sequence, ...], or a float one [batch, sequence, channels]",
            next_step="export with --dynamic batch",
        )
    return tuple(i.name for i in inputs if i in found)


def sequence_length(inputs: Sequence[ExampleInput]) -> int:
    """The length of the example's sequence. Raises UsageError as `sequence_inputs` does."""
    names = sequence_inputs(inputs)
    return next(i.shape[1] for i in inputs if i.name == names[0])


def named_specs(inputs: Sequence[ExampleInput], dims: Mapping[str, DimBounds]) -> list[TensorSpec]:
    """The inputs with the names of their dynamic dimensions. The batch is always named: a caller feeds what he has."""
    along = sequence_inputs(inputs) if SEQUENCE in dims else ()
    return [
        TensorSpec(i.name, i.dtype, (BATCH, SEQUENCE, *i.shape[2:]) if i.name in along else (BATCH, *i.shape[1:]))
        for i in inputs
    ]


def narrowed(asked: Mapping[str, DimBounds], found: Mapping[str, DimBounds]) -> list[str]:
    """A sentence for each dynamic dimension that the model takes within narrower bounds than were asked for."""
    return [
        f"the model takes a {name} of {found[name].describe()}: so does the bundle"
        for name in asked
        if name in found and found[name] != asked[name]
    ]


def _draw(item: ExampleInput, shape: tuple[int, ...], rng: np.random.Generator, magnitude: float) -> Array:
    if item.mask:
        lengths = rng.integers(max(1, shape[-1] // 2), shape[-1] + 1, size=shape[:-1])
        return (np.arange(shape[-1]) < lengths[..., None]).astype(item.dtype)
    if item.dtype in FLOATS:
        return (rng.standard_normal(shape) * magnitude).astype(item.dtype)
    if item.dtype == "bool":
        return rng.random(shape) < 0.5
    high = 2 if item.high is None else item.high
    return rng.integers(item.low, max(high, item.low + 1), size=shape).astype(item.dtype)


def describe_inputs(inputs: Sequence[ExampleInput]) -> str:
    return " ".join(f"--input {i.describe()}" for i in inputs)


def feeds_batch(feeds: Mapping[str, Array]) -> int:
    """The batch size of feeds: the first dimension of the first input."""
    first = next(iter(feeds.values()))
    return int(first.shape[0]) if first.ndim else 1
