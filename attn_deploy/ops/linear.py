"""Linear: residual + activation(norm(x) @ weight + bias), a linear layer with what stands around it.

norm is LayerNorm (Ba et al. 2016, equation 4) or nothing, the residual is there or not; both are in the name, as the
activation is. A layer scale (Touvron et al., CaiT, 2021, equation 5) is part of weight and bias.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from attn_deploy.ops import activation as activations
from attn_deploy.ops import layer_norm
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require


def check(x: Shape, weight: Shape, bias: Shape) -> None:
    """x [..., in], weight [in, out], bias [out]."""
    require(len(x) >= 2, f"x must be [..., in] of rank 2 or more, got {x}")
    require(len(weight) == 2 and weight[0] == x[-1], f"weight must be [{x[-1]}, out] for x {x}, got {weight}")
    require(bias == weight[1:], f"bias must be [{weight[1]}] for weight {weight}, got {bias}")


def multiply_adds(x: Shape, weight: Shape, *others: Shape, epsilon: float = 0.0) -> int:
    return math.prod(x) * weight[1]


def name_of(norm: bool, activation: str, residual: bool) -> str:
    return ("Norm" if norm else "") + "Linear" + activation + ("Residual" if residual else "")


def _form(norm: bool, activation: str, residual: bool) -> Form:
    def infer_shapes(x: Shape, weight: Shape, bias: Shape, *others: Shape, epsilon: float = 0.0) -> tuple[Shape, ...]:
        """x [..., in], weight [in, out], bias [out], norm_scale and norm_bias [in], residual [..., out]
        -> [..., out]."""
        check(x, weight, bias)
        if norm:
            layer_norm.check(x, others[0], others[1])
        shape = (*x[:-1], weight[1])
        require(not residual or others[-1] == shape, f"residual must be {shape}, got {others[-1:]}")
        return (shape,)

    def reference(x: Array, weight: Array, bias: Array, *others: Array, epsilon: float = 0.0) -> tuple[Array, ...]:
        rows = layer_norm.reference(x, others[0], others[1], epsilon) if norm else x.astype(np.float64)
        result = activations.ACTIVATIONS[activation](rows @ weight.astype(np.float64) + bias.astype(np.float64))
        return (result + others[-1].astype(np.float64) if residual else result,)

    inputs = [Input("x"), Input("weight"), Input("bias")]
    inputs += [Input("norm_scale"), Input("norm_bias")] if norm else []
    inputs += [Input("residual")] if residual else []
    steps = [layer_norm.statement("x", "rows")] if norm else []
    steps.append(f"product = MatMul ({'rows' if norm else 'x'}, weight)")
    steps.append(f"{'sum' if activation or residual else 'output'} = Add (product, bias)")
    if activation:
        steps += activations.statements(activation, "sum", "activated" if residual else "output")
    if residual:
        steps.append(f"output = Add ({'activated' if activation else 'sum'}, residual)")
    return Form(
        operator="Linear",
        name=name_of(norm, activation, residual),
        inputs=tuple(inputs),
        outputs=("output",),
        attributes={"epsilon": float} if norm else {},
        body=lines(*steps),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = tuple(
    _form(norm, activation, residual)
    for norm, activation, residual in itertools.product((False, True), activations.ACTIVATIONS, (False, True))
)
