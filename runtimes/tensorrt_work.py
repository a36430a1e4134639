"""Multiply-adds of the layers of a TensorRT network, from their shapes; 0 where a size is not known."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """What one ONNX node multiplies. `name` is the node's, or TensorRT's metadata that holds it."""

    name: str
    multiply_adds: int


def _known(*shapes: Shape) -> bool:
    return all(shape and min(shape) >= 0 for shape in shapes)


def product_work(first: Shape, result: Shape) -> int:
    """[..., M, K] x [..., K, N] -> [..., M, N], or the first one transposed, or a vector on either side."""
    if not _known(first) or any(size < 0 for size in result):
        return 0
    transposed = len(first) > 1 and len(result) > 1 and first[-2] != result[-2] and first[-1] == result[-2]
    return math.prod(result) * (first[-2] if transposed else first[-1])


def convolution_work(first: Shape, result: Shape, kernel: Shape, groups: int) -> int:
    """[batch, channels, ...] -> [batch, maps, ...]: each element of the result reads channels / groups x kernel."""
    if not _known(first, result, kernel) or len(first) < 3:
        return 0
    return math.prod(result) * (first[1] // groups) * math.prod(kernel)


def deconvolution_work(first: Shape, result: Shape, kernel: Shape, groups: int) -> int:
    """[batch, channels, ...] -> [batch, maps, ...]: each element of the input is read maps / groups x kernel times."""
    if not _known(first, result, kernel) or len(first) < 3:
        return 0
    return math.prod(first) * (result[1] // groups) * math.prod(kernel)


def attention_work(query: Shape, key: Shape, value: Shape) -> int:
    """Query [batch, heads, query_len, head_dim], key and value [batch, key_value_heads, key_len, head_dim]: the scores,
    and the weighted sum of the values. Grouped heads are counted once for each head of the query."""
    if not _known(query, key, value) or not len(query) == len(key) == len(value) == 4:
        return 0
    batch, heads, query_len, head_dim = query
    return batch * heads * query_len * key[2] * (head_dim + value[3])
