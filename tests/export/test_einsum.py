"""Einsum as one matrix product: the same numbers as torch.einsum, and which equations it takes."""

from __future__ import annotations

import pytest
import torch

from attn_deploy.export.einsum import as_matrix_product, is_matrix_product

SIZES = dict(zip("abcdhijkn", (2, 3, 4, 5, 6, 7, 8, 9, 10), strict=True))

PRODUCTS = (
    "bhid,bhjd->bhij",
    "bhij,bhjd->bhid",
    "b h i d, b h j d -> b h i j",
    "bihd,bjhd->bhij",
    "bhij,bjhd->bihd",
    "abhid,abhjd->abhij",
    "bid,jd->bij",
    "ij,jk->ik",
    "bnij,bnjk->bnki",
    "bik,bjk->jbi",
    "bi,bj->bij",
    "abij,abkd->abijkd",
    "bcd,cdh->bh",
    "bi,bi->b",
)


@pytest.mark.parametrize("equation", PRODUCTS)
def test_matrix_product_gives_einsum_s_numbers(equation: str) -> None:
    assert is_matrix_product(equation, 2)
    terms = equation.replace(" ", "").split("->")[0].split(",")
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn([SIZES[c] for c in term], generator=generator, dtype=torch.float64) for term in terms]
    expected = torch.einsum(equation, operands)
    torch.testing.assert_close(as_matrix_product(equation, operands), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "equation", ["ii,ij->ij", "...ij,...jk->...ik", "ij->ji", "ij,jk,kd->id", "ijk,jd->id", "ij,jk"]
)
def test_what_is_no_matrix_product_of_two(equation: str) -> None:
    assert not is_matrix_product(equation, equation.split("->")[0].count(",") + 1)
