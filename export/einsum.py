"""Einsum of two operands as one matrix product, so that an attention spelled with it is an attention like any other."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def is_matrix_product(equation: str, operands: int) -> bool:
    """Two operands, named axes only, none twice in one term, and each axis of the result in one of them."""
    terms = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", equation.replace(" ", ""))
    if terms is None or operands != 2:
        return False
    first, second, result = terms.groups()
    unique = all(len(set(term)) == len(term) for term in (first, second, result))
    alone = (set(first) ^ set(second)) - set(result)  # summed over within one operand
    return unique and not alone and set(result) <= set(first) | set(second)


def as_matrix_product(equation: str, operands: list[Tensor], path: list[int] | None = None) -> Tensor:
    """torch.einsum where `is_matrix_product`: [batch..., rows, summed] times [batch..., summed, columns]."""
    first, second, result = re.split(",|->", equation.replace(" ", ""))
    if _columns_first(first, second, result):  # the other way round nothing has to be exchanged behind the product
        first, second, operands = second, first, operands[::-1]
    batch = [c for c in result if c in first and c in second]
    summed = [c for c in first if c in second and c not in result]
    rows = [c for c in result if c in first and c not in second]
    columns = [c for c in result if c in second and c not in first]
    left, right = operands
    sizes = dict(zip(first, left.shape, strict=True)) | dict(zip(second, right.shape, strict=True))
    left = _matrices(_permuted(left, [first.index(c) for c in (*batch, *rows, *summed)]), len(batch), len(rows))
    right = _matrices(_permuted(right, [second.index(c) for c in (*batch, *summed, *columns)]), len(batch), len(summed))
    product = torch.matmul(left, right)
    axes = [*batch, *rows, *columns]
    if len(rows) != 1 or len(columns) != 1:
        product = product.reshape([sizes[c] for c in axes])
    return _permuted(product, [axes.index(c) for c in result])


def _columns_first(first: str, second: str, result: str) -> bool:
    """True where the result has an axis of the second operand before those of the first."""
    alone = [c in first for c in result if (c in first) != (c in second)]
    return bool(alone) and not alone[0]


def _permuted(value: Tensor, dims: list[int]) -> Tensor:
    return value if dims == sorted(dims) else value.permute(dims)


def _matrices(value: Tensor, batch: int, rows: int) -> Tensor:
    """[batch..., rows..., columns...] with one axis each for rows and columns."""
    if rows == 1 and value.dim() == batch + 2:
        return value
    shape = value.shape
    sizes = [1, 1]
    for axis, size in enumerate(shape[batch:]):
        sizes[axis >= rows] = sizes[axis >= rows] * size
    return value.reshape([*shape[:batch], *sizes])
