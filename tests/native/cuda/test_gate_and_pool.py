"""The Gate and ChannelPool kernels' numbers on the emulated GPU, against the float64 references of attn_deploy/ops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attn_deploy.ops import FORMS

RunForm = Callable[..., list[np.ndarray]]
RoundTo = Callable[[np.ndarray, str], np.ndarray]
Feeds = dict[str, np.ndarray]
Shape = tuple[int, ...]

DTYPES = ("float32", "float16", "bfloat16")
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
GATE_FORMS = [name for name, form in FORMS.items() if form.operator == "Gate"]
POOL_FORMS = [name for name, form in FORMS.items() if form.operator == "ChannelPool"]

GATE_SHAPES: dict[str, Callable[[int, int, int, int], Shape]] = {
    "per-channel": lambda n, c, h, w: (n, c, 1, 1),
    "per-pixel": lambda n, c, h, w: (n, 1, h, w),
    "per-row": lambda n, c, h, w: (n, c, h, 1),
    "channels-last": lambda n, c, h, w: (n, 1, 1, w),
    "one-number": lambda n, c, h, w: (1, 1, 1, 1),
    "full": lambda n, c, h, w: (n, c, h, w),
}


def gate_feeds(form: str, shape: Shape, gate_shape: Shape, round_to: RoundTo, dtype: str) -> Feeds:
    rng = np.random.default_rng(0)
    shapes = {"x": shape, "gate": gate_shape, "residual": shape}
    return {i.name: round_to(3 * rng.standard_normal(shapes[i.name]), dtype) for i in FORMS[form].inputs}


def assert_gated(form: str, dtype: str, feeds: Feeds, output: np.ndarray) -> None:
    """Allowed: a rounding of the result to `dtype`, and float32's roundings of each term."""
    (expected,) = FORMS[form].reference(*feeds.values())
    magnitude = np.abs(feeds["x"].astype(np.float64) * feeds["gate"]) + np.abs(feeds.get("residual", 0.0))
    allowed = ROUNDING[dtype] * np.abs(expected) + 4 * ROUNDING["float32"] * magnitude + 2.0**-25
    assert output.shape == expected.shape
    assert (np.abs(output - expected) <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_kind", GATE_SHAPES)
@pytest.mark.parametrize("form", ["Gate", "GateResidualSilu"])
def test_every_way_to_broadcast(
    run_form: RunForm, gpu: object, round_to: RoundTo, form: str, gate_kind: str, dtype: str
) -> None:
    """Maps whose rows are whole vectors of 16 bytes, and maps of 49 pixels, whose rows are not."""
    for shape in ((2, 3, 4, 8), (2, 5, 7, 7), (1, 1, 1, 3)):
        feeds = gate_feeds(form, shape, GATE_SHAPES[gate_kind](*shape), round_to, dtype)
        assert_gated(form, dtype, feeds, run_form(form, dtype, feeds)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", GATE_FORMS)
def test_every_gate_form(run_form: RunForm, gpu: object, round_to: RoundTo, form: str, dtype: str) -> None:
    feeds = gate_feeds(form, (3, 2, 5, 4), (3, 2, 1, 1), round_to, dtype)
    assert_gated(form, dtype, feeds, run_form(form, dtype, feeds)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grid_smaller_than_the_tensor_does_all_of_it(
    run_form: RunForm, gpu: object, round_to: RoundTo, dtype: str
) -> None:
    """At most 16 blocks of 256 threads here: every thread goes round several times."""
    feeds = gate_feeds("GateRelu", (1, 4, 200, 101), (1, 4, 1, 1), round_to, dtype)
    assert_gated("GateRelu", dtype, feeds, run_form("GateRelu", dtype, feeds)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["Gate", "GateRelu", "GateSilu"])
def test_nan_and_infinities_come_through(run_form: RunForm, gpu: object, form: str, dtype: str) -> None:
    inf, nan = np.inf, np.nan
    x = np.tile(np.array([inf, -inf, nan, 0.0, inf], np.float32), 7)
    gate = np.tile(np.array([1.0, 1.0, 1.0, 1.0, 0.0], np.float32), 7)
    expected = [inf, -inf if form == "Gate" else 0.0, nan, 0.0, nan]
    np.testing.assert_array_equal(
        run_form(form, dtype, {"x": x, "gate": gate})[0], np.tile(np.array(expected, np.float32), 7)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", POOL_FORMS)
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 9, 7, 7), (2, 3, 8, 8), (1, 2, 45, 46), (1, 2, 64, 64)], ids=str)
def test_pools(run_form: RunForm, gpu: object, round_to: RoundTo, shape: Shape, form: str, dtype: str) -> None:
    """Planes of a warp and, above 2048 pixels, of a block; starting at and beside multiples of 16 bytes."""
    x = round_to(3 + np.random.default_rng(0).standard_normal(shape), dtype)
    for output, expected in zip(run_form(form, dtype, {"x": x}), FORMS[form].reference(x), strict=True):
        assert output.shape == expected.shape
        assert (np.abs(output - expected) <= (ROUNDING[dtype] + 2.0**-20) * np.abs(expected)).all()


@pytest.mark.parametrize("pixels", [40, 3000])
def test_the_maximum_of_a_plane_with_nan_is_nan(run_form: RunForm, gpu: object, pixels: int) -> None:
    x = np.ones((1, 3, 1, pixels), np.float32)
    x[0, 1, 0, pixels // 3] = np.nan
    maximum = run_form("ChannelPoolMax", "float32", {"x": x})[0]
    np.testing.assert_array_equal(maximum.ravel(), [1, np.nan, 1])


def test_a_mean_of_many_halves_is_summed_in_float32(run_form: RunForm, gpu: object) -> None:
    """A sum in float16 would stop at 2048; the largest value is beyond its range."""
    x = np.full((1, 1, 100, 100), 60.0, np.float32)
    assert run_form("ChannelPoolMean", "float16", {"x": x})[0].item() == 60.0
