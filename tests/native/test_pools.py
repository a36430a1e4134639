"""ChannelPool and SpatialPool: their kernels on every instruction set, and their operators in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from kernel_runner import Case, KernelRunner

from attn_deploy.ops import FORMS

Array = np.ndarray
RunForm = Callable[..., list[np.ndarray]]

CHANNEL_FORMS = [name for name, form in FORMS.items() if form.operator == "ChannelPool"]
SPATIAL_FORMS = [name for name, form in FORMS.items() if form.operator == "SpatialPool"]

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 64, 65, 127, 129, 196, 499, 512, 513, 3136)
"""Around the lengths of vectors, of four of them and of the kernel's chunks; primes; maps at the end of a CNN."""

PARTS = {"mean": (1, 0), "maximum": (0, 1), "both": (1, 1)}


def assert_pooled(x: Array, axis: int, parts: tuple[int, int], outputs: list[Array]) -> None:
    """Allowed: 32 units in the last place of the mean magnitude, as the kernels' headers say."""
    exact = x.astype(np.float64)
    expected = [exact.mean(axis)] * parts[0] + [exact.max(axis)] * parts[1]
    allowed = [32 * 2.0**-24 * np.abs(exact).mean(axis)] * parts[0] + [0.0] * parts[1]
    for output, wanted, error in zip(outputs, expected, allowed, strict=True):
        assert (np.abs(output - wanted) <= error).all()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_channel_pool_of_every_size_and_misalignment(kernel_runner: KernelRunner, parts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((3, size), dtype=np.float32) - 2 for size in SIZES]  # no maximum is 0, as padding is
    cases = [Case("channel_pool", [x], parts, misalignments=[off]) for x in xs for off in range(4)]
    for case, outputs in zip(cases, kernel_runner(cases), strict=True):
        assert_pooled(case.inputs[0], 1, parts, outputs)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_spatial_pool_of_every_size_and_misalignment(kernel_runner: KernelRunner, parts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for pixels in SIZES[:-4]:
        for channels, beyond in ((1, 0), (2, 3), (15, 0), (17, 5), (64, 1)):
            x = rng.standard_normal((channels, pixels + beyond), dtype=np.float32) - 2
            cases.append(Case("spatial_pool", [x], [*parts, pixels], misalignments=[channels % 4]))
    for case, outputs in zip(cases, kernel_runner(cases), strict=True):
        assert_pooled(case.inputs[0][:, : case.ints[2]], 0, parts, outputs)


def test_means_stay_accurate_up_to_the_largest_maps(kernel_runner: KernelRunner) -> None:
    """Large maps far from 0, where a plain sum in float32 is off by hundreds of units."""
    rng = np.random.default_rng(0)
    maps = [rng.random((1, size * size), dtype=np.float32) * 0.01 + 100 for size in (7, 56, 112, 224)]
    columns = [np.ascontiguousarray(x.reshape(-1, 49)[:1024]) for x in maps[1:]]
    cases = [Case("channel_pool", [x], PARTS["mean"]) for x in maps]
    cases += [Case("spatial_pool", [x], [*PARTS["mean"], 49]) for x in columns]
    for case, (mean,) in zip(cases, kernel_runner(cases), strict=True):
        exact = case.inputs[0].astype(np.float64).mean(1 if case.kernel == "channel_pool" else 0)
        assert (np.abs(mean - exact) <= 4 * np.spacing(exact.astype(np.float32))).all()


@pytest.mark.parametrize("size", [1, 5, 16, 37, 300])
def test_nan_and_infinities_come_through_from_anywhere(kernel_runner: KernelRunner, size: int) -> None:
    places = sorted({0, size // 2, size - 1})
    x = np.full((4 * len(places), size), -1.0, np.float32)
    for row, place in enumerate(places):
        for kind, value in enumerate((np.nan, np.inf, -np.inf)):
            x[4 * row + kind, place] = value
    # A NaN and larger numbers behind it.
    x[3::4, 0] = np.nan
    x[3::4, 1:] = 5.0
    cases = [Case("channel_pool", [x], (1, 1)), Case("spatial_pool", [x.T.copy()], (1, 1, len(x)))]
    with np.errstate(invalid="ignore"):
        expected = [x.astype(np.float64).mean(1), x.max(1)]
    for mean, maximum in kernel_runner(cases):
        rare = ~np.isfinite(expected[0])
        np.testing.assert_array_equal(mean[rare], expected[0][rare])
        np.testing.assert_array_equal(maximum, expected[1])


@pytest.mark.parametrize("form", CHANNEL_FORMS + SPATIAL_FORMS)
def test_operators_equal_the_reference_on_any_number_of_threads(run_form: RunForm, form: str) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1, 1), (3, 5, 7, 11), (2, 67, 40, 33)):
        x = rng.standard_normal(shape, dtype=np.float32)
        outputs = run_form(form, {"x": x})
        for output, expected in zip(outputs, FORMS[form].reference(x), strict=True):
            assert output.shape == expected.shape
            np.testing.assert_allclose(output, expected, rtol=0, atol=32 * 2.0**-24)
        for threads in (2, 3, 8):
            for alone, together in zip(outputs, run_form(form, {"x": x}, threads=threads), strict=True):
                np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("ChannelPoolMean", (2, 3, 4)),
        ("ChannelPoolMeanMax", (2, 3, 0, 4)),
        ("SpatialPoolMax", (2, 3, 4, 5, 6)),
        ("SpatialPoolMeanMax", (2, 0, 4, 5)),
    ],
)
def test_shapes_that_cannot_be_pooled_are_refused_by_node_name(
    make_model: Callable[..., bytes],
    open_model: Callable[..., onnxruntime.InferenceSession],
    library: object,
    form: str,
    shape: tuple[int, ...],
) -> None:
    session = open_model(make_model(form, node_name="layer1/pool"), library=library)
    with pytest.raises(Exception, match=rf"{form} node 'layer1/pool': x has shape \[{','.join(map(str, shape))}\]"):
        session.run(None, {"x": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("ChannelPoolMeanMax", [["batch", 6, 1, 1]] * 2),
        ("SpatialPoolMax", [["batch", 1, "height", "width"]]),
        ("SpatialPoolMaxMean", [["batch", 2, "height", "width"]]),
    ],
)
def test_the_graph_knows_the_outputs_shapes(
    make_model: Callable[..., bytes],
    open_model: Callable[..., onnxruntime.InferenceSession],
    library: object,
    form: str,
    expected: list[list[str | int]],
) -> None:
    model = make_model(form, with_body=False, shapes={"x": ["batch", 6, "height", "width"]})
    assert [output.shape for output in open_model(model, library=library).get_outputs()] == expected
