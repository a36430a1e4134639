"""Dynamic dimensions: how they are asked of torch.export, and how far a model lets the sequence go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from attn_deploy.errors import CaptureError, UsageError
from attn_deploy.export.graph import aten, constants, depends_on_data, evaluate, user_inputs
from attn_deploy.inputs import ExampleInput, sequence_inputs, sequence_length
from attn_deploy.session import BATCH, SEQUENCE, DimBounds

Dims = Mapping[str, DimBounds]


def dynamic_shapes(inputs: Sequence[ExampleInput], dims: Dims) -> dict[str, dict[int, Any]]:
    """For each input the dimensions that are dynamic, as torch.export takes them."""
    symbols = {name: _symbol(name, bounds) for name, bounds in dims.items()}
    along = sequence_inputs(inputs) if SEQUENCE in dims else ()
    shapes: dict[str, dict[int, Any]] = {}
    for item in inputs:
        axes = {BATCH: 0} | ({SEQUENCE: 1} if item.name in along else {})
        shapes[item.name] = {axis: symbols[name] for name, axis in axes.items() if name in symbols}
    return shapes


def _symbol(name: str, bounds: DimBounds) -> Any:
    return Dim(name, min=bounds.min) if bounds.max is None else Dim(name, min=bounds.min, max=bounds.max)


def require_example_within(inputs: Sequence[ExampleInput], dims: Dims) -> None:
    """Raises UsageError when the example's sequence is not one that the bundle shall take: all is tried on it."""
    if SEQUENCE not in dims:
        return
    length, bounds = sequence_length(inputs), dims[SEQUENCE]
    if length < 2 or bounds.within(length) != length:
        low = max(2, bounds.min)
        raise UsageError(
            "the example's sequence is out of the asked bounds",
            got=", ".join(i.describe() for i in inputs if i.name in sequence_inputs(inputs)),
            expected=f"a length of {DimBounds(low, bounds.max).describe()}",
            next_step=f"give the inputs another length with --input, or other bounds: --dynamic {SEQUENCE}=MIN:MAX",
        )


_SUGGESTION = r"^\s*{name} = Dim\('{name}'(?:, min=(?P<min>\d+))?(?:, max=(?P<max>\d+))?\)\s*$"


def bounds_of_the_model(dims: Dims, text: str) -> DimBounds | None:
    """The bounds of the sequence for which tracing holds, as torch.export suggests them in its error; None when the
    error is about something else."""
    asked = dims.get(SEQUENCE)
    if asked is None:
        return None
    found = re.search(_SUGGESTION.format(name=SEQUENCE), text, re.MULTILINE)
    low = max(asked.min, int(found["min"] or 1)) if found else asked.min
    high = int(found["max"]) if found and found["max"] else asked.max
    guards = unmet_guards(text)
    if high is not None and high == asked.max and guards and all(" != " in guard for guard in guards):
        high -= 1  # a buffer that is cut to the sequence: at its full length it is not cut, which is another graph
    possible = DimBounds(low, high)
    return None if possible == asked else possible


def unmet_guards(text: str) -> list[str]:
    """What torch.export found to hold for the example, and not for every size that was asked for."""
    return [guard.rstrip(".") for guard in re.findall(r"satisfy the generated guard (.*)", text)]


def require_asked_bounds(asked: Dims, possible: DimBounds) -> None:
    """Raises CaptureError when the user bounded the sequence otherwise than the model does. Bounds that were left open
    become the model's."""
    bounds = asked[SEQUENCE]
    if bounds.max is not None and possible != bounds:
        raise CaptureError(
            "the model does not take sequences of every length that was asked for",
            got=bounds.describe(),
            expected=possible.describe(),
            next_step=f"--dynamic {SEQUENCE}={possible.min}:{'' if possible.max is None else possible.max}",
        )


def longest_by_tables(program: ExportedProgram) -> int | None:
    """The longest sequence for which every table of positions has a row.

    torch.export sees a slice that ends; it does not see that a table is looked up behind its end.
    """
    known = constants(program)
    symbol = _sequence_symbol(program)
    limits = []
    for table, index in _position_tables(program, known):
        rows = known[table.name].shape[0]

        def last(length: int, index: Node = index) -> int:
            return int(evaluate(index, known, {symbol: length}).max())

        try:
            longest = 2 * rows - 1 - last(rows)
            ends_there = longest > 1 and last(longest) == rows - 1 and last(longest + 1) == rows
        except (IndexError, RuntimeError):  # the index itself ends before the table: torch.export saw that
            continue
        if ends_there:
            limits.append(longest)
    return min(limits, default=None)


def _position_tables(program: ExportedProgram, known: Mapping[str, torch.Tensor]) -> Iterator[tuple[Node, Node]]:
    """(table, index) of every look-up in a parameter or buffer whose index follows from sizes alone."""
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, index = node.args[:2]
        if not isinstance(table, Node) or not isinstance(index, Node):
            continue
        if table.name in known and not depends_on_data(index, known):
            yield table, index


def dims_of_program(program: ExportedProgram, inputs: Sequence[ExampleInput]) -> dict[str, DimBounds]:
    """The dynamic dimensions of a program that was saved. Raises CaptureError for others than batch and sequence."""
    names = (BATCH, SEQUENCE)
    shapes = [n.meta["val"].shape for n in user_inputs(program)]
    found = {
        (axis, size.node.expr) for shape in shapes for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)
    }
    by_axis = dict(found)
    plain = all(symbol.is_Symbol for symbol in by_axis.values())
    if len(by_axis) != len(found) or len(set(by_axis.values())) != len(found) or not plain or set(by_axis) - {0, 1}:
        raise CaptureError(
            "the saved program has other dynamic dimensions than a batch and a sequence",
            got=", ".join(f"{symbol} as dimension {axis}" for axis, symbol in sorted(found, key=str)),
            expected="one batch, as the first dimension of every input, and one sequence at most, as the second one",
            next_step='export it with dynamic_shapes={name: {0: Dim("batch")}}',
        )
    if 1 in by_axis:
        sequence_inputs(inputs)
    return {names[axis]: _bounds(program.range_constraints[by_axis[axis]], axis + 1) for axis in sorted(by_axis)}


def _bounds(values: Any, least: int) -> DimBounds:
    """A value range of torch.export, which counts from 0 where no bound was given."""
    upper = values.upper
    return DimBounds(max(least, int(values.lower)), int(upper) if upper.is_finite and upper < 2**31 else None)


def _sequence_symbol(program: ExportedProgram) -> Any:
    for node in user_inputs(program):
        shape = list(node.meta["val"].shape)
        if len(shape) >= 2 and isinstance(shape[1], torch.SymInt):
            return shape[1].node.expr
    raise AssertionError("the sequence is dynamic")


__all__ = [
    "Dims",
    "bounds_of_the_model",
    "dims_of_program",
    "dynamic_shapes",
    "longest_by_tables",
    "require_asked_bounds",
    "require_example_within",
    "unmet_guards",
]
