"""What one operator form is: a name, its schema, shape rule, reference and ONNX function body.

An operator has one name per form: an optional input that is absent makes another name, never an overload, since
ONNX Runtime 1.21 gives wrong numbers for overloads and a body cannot ask whether an input is there.
This package imports neither onnx nor torch: bodies are ONNX text, parsed where models are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

DOMAIN = "attn_deploy"
VERSION = 1
BODY_OPSET = 20
"""The opset the bodies are written for; they use nothing that changed up to opset 25."""

Shape = tuple[int, ...]
Attributes = Mapping[str, float | int]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Input:
    """`dtype` is float32, int64 or bool: the type in the canonical FP32 model; or uint8, of a weight in 8 bits."""

    name: str
    dtype: str = "float32"


@dataclass(frozen=True)
class Form:
    """One operator name of the ONNX domain `attn_deploy`.

    `attributes` maps each attribute to `float` or `int`; every one stands on every node.
    `reference` takes arrays and attributes and returns the outputs in float64.
    `infer_shapes` maps input shapes and attributes to output shapes, or raises ValueError naming the mismatch.
    `multiply_adds` counts them from input shapes and attributes.
    """

    operator: str
    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    body: str
    reference: Callable[..., tuple[Array, ...]]
    infer_shapes: Callable[..., tuple[Shape, ...]]
    multiply_adds: Callable[..., int]
    output_dtype: str = "float32"

    def function_text(self) -> str:
        """The model-local function as ONNX text."""
        attributes = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        inputs = ", ".join(i.name for i in self.inputs)
        outputs = ", ".join(self.outputs)
        return (
            f'<domain: "{DOMAIN}", opset_import: ["" : {BODY_OPSET}]>\n'
            f"{self.name}{attributes} ({inputs}) => ({outputs})\n{{\n{self.body}}}\n"
        )


def require(condition: bool, message: str) -> None:
    """Shape rules state what they need in one line."""
    if not condition:
        raise ValueError(message)


def lines(*statements: str) -> str:
    """ONNX text of a body from its statements; empty ones are left out."""
    return "".join(f"  {s}\n" for s in statements if s)


def softmax_float64(scores: Array, keep: Array | None = None) -> Array:
    """softmax over the last axis in float64; a row that keeps no key gives 0."""
    scores = scores.astype(np.float64)
    if keep is not None:
        scores = np.where(keep, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
