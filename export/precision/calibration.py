"""Streaming calibration: the range of chosen activations over samples, in memory that does not grow with them.

Minimum and maximum of each activation are computed inside the graph, so that a batch returns two numbers per sample
and activation instead of the activations (stock calibrators keep them all: onnxruntime#10503, #21979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import AttnDeployError
from attn_deploy.session import Array

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
OpenModel = Callable[[ir.Model], Run]
"""Opens an ONNX model for running; the pipeline hands it in, since this package opens no runtime."""


@dataclass(frozen=True)
class Range:
    """Range of an activation over all samples. Not the mean of the samples' extrema: on
    mobilenetv3_small_100 with real images that clipped what mattered (6 dB where the whole range left 21)."""

    low: float
    high: float


def collect_ranges(
    model: ir.Model, names: Sequence[str], batches: Iterable[Mapping[str, Array]], open_model: OpenModel
) -> dict[str, Range]:
    """Ranges by value name over all samples of `batches`. Raises AttnDeployError on NaN, or without any sample."""
    run = open_model(_with_extrema(model, names))
    low = {name: np.inf for name in names}
    high = {name: -np.inf for name in names}
    samples = 0
    for feeds in batches:
        outputs = run(feeds)
        samples += len(next(iter(outputs.values())))
        for name in names:
            minimum, maximum = outputs[f"{name}/minimum"], outputs[f"{name}/maximum"]
            if not (np.isfinite(minimum).all() and np.isfinite(maximum).all()):
                raise AttnDeployError("an activation is not finite on the calibration data", where=name)
            low[name] = min(low[name], float(minimum.min()))
            high[name] = max(high[name], float(maximum.max()))
    if not samples:
        raise AttnDeployError("calibration saw no sample", got=0, expected="at least 1")
    return {name: Range(low[name], high[name]) for name in names}


def observed_copy(model: ir.Model) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy without outputs, and its activations and inputs by name: to be given what is observed as outputs."""
    copy = model.clone()
    values = {str(o.name): o for node in copy.graph for o in node.outputs}
    values |= {str(i.name): i for i in copy.graph.inputs}
    copy.graph.outputs.clear()
    return copy, values


def _with_extrema(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy whose outputs are the extrema per sample of the named values, each [batch].

    ONNX Runtime's ReduceMin and ReduceMax pass over NaN: the sum of the values times zero makes NaN of the minimum.
    """
    copy, values = observed_copy(model)
    zero = ir.Value(name="calibration/zero", const_value=ir.tensor(np.float32(0.0), name="calibration/zero"))
    copy.graph.register_initializer(zero)
    for name in names:
        value = values[name]
        rank = len(value.shape) if value.shape is not None else 4
        axes = ir.Value(
            name=f"{name}/axes", const_value=ir.tensor(np.arange(1, rank, dtype=np.int64), name=f"{name}/axes")
        )
        copy.graph.register_initializer(axes)
        nothing = ir.node("Mul", [value, zero], name=f"{name}/nothing")
        reductions = [
            ir.node(operator, [operand, axes], {"keepdims": 0}, name=f"{name}/{operator}")
            for operator, operand in (("ReduceMin", value), ("ReduceMax", value), ("ReduceSum", nothing.outputs[0]))
        ]
        low, high, zero_or_nan = (n.outputs[0] for n in reductions)
        minimum = ir.node("Add", [low, zero_or_nan], name=f"{name}/minimum")
        copy.graph.extend([nothing, *reductions, minimum])
        for kind, output in (("minimum", minimum.outputs[0]), ("maximum", high)):
            output.name, output.shape = f"{name}/{kind}", ir.Shape([None])
            output.type = ir.TensorType(ir.DataType.FLOAT)
            copy.graph.outputs.append(output)
    return copy
