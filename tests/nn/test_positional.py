"""Positional encodings: their formulas, and that a rotated product knows distances only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_deploy.nn import LearnedPositionalEncoding, RotaryPositionalEncoding, SinusoidalPositionalEncoding


def test_the_sinusoidal_table_is_the_paper_s() -> None:
    x = torch.randn(2, 7, 6)
    added = (SinusoidalPositionalEncoding(6, 20, base=50.0)(x) - x)[1]
    for position in range(7):
        for i in range(3):
            angle = position / 50.0 ** (2 * i / 6)
            assert added[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert added[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_late_positions_keep_their_phase() -> None:
    """With frequencies in float32, 1 / sqrt(10) turns 0.001 too far by position 100,000."""
    table = SinusoidalPositionalEncoding(4, 100_001, base=10.0).table
    assert table[100_000, 2] == pytest.approx(math.sin(100_000 / math.sqrt(10)), abs=1e-6)


def test_a_learned_encoding_adds_its_first_rows() -> None:
    module = LearnedPositionalEncoding(4, 9)
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(module(x) - x, module.table[:5].expand(3, 5, 4), rtol=0, atol=1e-6)
    assert 0.01 < module.table.std() < 0.03


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_rotation_multiplies_complex_numbers(interleaved: bool) -> None:
    """A pair as a + ib, times e^(i angle): equation 12 of the paper, on NumPy's complex numbers."""
    module = RotaryPositionalEncoding(6, 9, base=100.0, interleaved=interleaved).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64).numpy()
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :3], x[..., 3:])
    angle = np.arange(7)[:, None] / 100.0 ** (np.arange(3) / 3)
    turned = (a + 1j * b) * np.exp(1j * angle)
    parts = (turned.real, turned.imag)
    expected = np.stack(parts, axis=-1).reshape(x.shape) if interleaved else np.concatenate(parts, axis=-1)
    # the tables are float32 until the module becomes float64
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_a_rotated_product_depends_on_the_distance_alone(interleaved: bool) -> None:
    """The same query and key at every position: scores are constant along diagonals, and differ between them."""
    torch.manual_seed(0)
    module = RotaryPositionalEncoding(8, 12, interleaved=interleaved)
    query, key = (module(torch.randn(8).expand(1, 1, 12, 8))[0, 0] for _ in range(2))
    scores = query @ key.T
    by_distance = [scores.diagonal(d) for d in range(-11, 12)]
    assert max((d - d[0]).abs().max() for d in by_distance) < 1e-5
    values = torch.stack([d[0] for d in by_distance]).sort().values
    assert values.diff().min() > 1e-3


def test_a_rotation_changes_no_length_and_not_the_first_token() -> None:
    x = torch.randn(2, 3, 5, 8)
    turned = RotaryPositionalEncoding(8, 5)(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert (turned - x).abs().max() > 0.1


@pytest.mark.parametrize("make", [SinusoidalPositionalEncoding, RotaryPositionalEncoding])
def test_a_computed_table_is_not_saved(make) -> None:  # type: ignore[no-untyped-def]
    assert make(8, 5).state_dict() == {}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SinusoidalPositionalEncoding(5, 9), "dim: got 5, expected an even number"),
        (lambda: RotaryPositionalEncoding(5, 9), "head_dim: got 5, expected an even number"),
        (lambda: RotaryPositionalEncoding(4, 9, base=0), "base: got 0, expected a positive number"),
        (lambda: LearnedPositionalEncoding(4, 0), "max_len: got 0, expected 1 or more"),
        (lambda: SinusoidalPositionalEncoding(4, 9)(torch.zeros(2, 10, 4)), "tokens: got 10, expected at most max_len"),
        (lambda: LearnedPositionalEncoding(4, 9)(torch.zeros(2, 5, 6)), r"got \[2, 5, 6\], expected \[batch, tokens"),
        (lambda: RotaryPositionalEncoding(4, 9)(torch.zeros(2, 5, 4)), r"got \[2, 5, 4\], expected \[batch, heads"),
        (lambda: RotaryPositionalEncoding(4, 9)(torch.zeros(2, 1, 10, 4)), "tokens: got 10, expected at most max_len"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call()
