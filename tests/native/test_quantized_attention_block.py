"""QuantizedAttentionBlock over windows, as a kernel and as an operator, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from kernel_runner import KernelRunner
from quantized_block_cases import BlockSizes, QuantizedAttentionBlock

Array = np.ndarray
SUFFIXES = [
    "Indexed" + padded + cosine + bias
    for padded in ("", "Padded")
    for cosine in ("", "Cosine")
    for bias in ("", "Bias")
]

# Windows of 1, 7 and 49 tokens; channels around the columns of a panel (16 or 32) and not a multiple of a vector.
SIZES = [
    BlockSizes(1, 1, 1, 1, 1),
    BlockSizes(2, 3, 7, 2, 9),
    BlockSizes(1, 5, 9, 3, 16),
    BlockSizes(1, 2, 49, 3, 32),
    BlockSizes(3, 4, 16, 1, 33),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_kernel_equals_the_definition(int8_kernel_runner: KernelRunner, suffix: str) -> None:
    calls = [QuantizedAttentionBlock(suffix, sizes) for sizes in SIZES]
    feeds = [call.feeds() for call in calls]
    for together in (1, 2):
        cases = [call.case(given, together) for call, given in zip(calls, feeds, strict=True)]
        for call, given, (output,) in zip(calls, feeds, int8_kernel_runner(cases), strict=True):
            call.check(output, given)


def test_most_rows_are_held_to_the_tight_bound() -> None:
    """The bound for levels that are unsure must not be what the tests above rest on."""
    call = QuantizedAttentionBlock("IndexedBias", SIZES[3])
    assert (call.unsure(call.feeds()) == 0).mean() > 0.5


def test_nan_stays_in_its_window(int8_kernel_runner: KernelRunner) -> None:
    call = QuantizedAttentionBlock("IndexedPaddedBias", SIZES[2])
    feeds = call.feeds()
    window = feeds["index"][1]
    feeds["x"][0, window[window >= 0][0], 5] = np.nan
    ((output,),) = int8_kernel_runner([call.case(feeds, 2)])
    finite = np.isfinite(output[0])
    assert not finite[window[window >= 0]].any()
    assert finite[np.setdiff1d(np.arange(call.tokens), window)].all()


def constants_of(feeds: dict[str, Array]) -> dict[str, Array]:
    return {name: value for name, value in feeds.items() if name != "x"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_operator_gives_the_same_bits_on_any_number_of_threads(run_form: Callable, suffix: str) -> None:
    call = QuantizedAttentionBlock(suffix, BlockSizes(2, 16, 9, 2, 8))
    feeds = call.feeds()
    outputs = [
        run_form(
            call.form, {"x": feeds["x"]}, threads=threads, attributes=call.attributes, constants=constants_of(feeds)
        )[0]
        for threads in (1, 2, 3, 8)
    ]
    call.check(outputs[0], feeds)
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


SMALL = QuantizedAttentionBlock("IndexedBias", BlockSizes(1, 3, 7, 2, 9))


def test_no_sample_gives_no_output(run_form: Callable) -> None:
    feeds = SMALL.feeds()
    empty = feeds["x"][:0]
    (output,) = run_form(SMALL.form, {"x": empty}, attributes=SMALL.attributes, constants=constants_of(feeds))
    assert output.shape == empty.shape


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index", lambda v: np.where(v == 0, 1, v), "twice"),
        ("norm_bias", lambda v: v[:-1], r"norm_bias .*shape \[17\]; expected float32 \(1\) of shape \[18\]"),
        (
            "weight_qkv_scale",
            lambda v: v[:-1],
            r"weight_qkv_scale .*shape \[53\]; expected .* of shape \[54\]",
        ),
        ("weight_out", lambda v: v[:, :-1], r"weight_out_scale .*shape \[18\]; expected float32 \(1\) of shape \[17\]"),
        ("bias_index", lambda v: v + 2, "bias_index holds"),
    ],
)
def test_constants_that_do_not_fit_are_refused_at_load(
    run_form: Callable, name: str, change: Callable[[Array], Array], message: str
) -> None:
    feeds = SMALL.feeds()
    constants = constants_of(feeds)
    constants[name] = change(constants[name])
    with pytest.raises(Exception, match=f"(?s){SMALL.form} node 'block/node'.*{message}"):
        run_form(SMALL.form, {"x": feeds["x"]}, attributes=SMALL.attributes, constants=constants)


def test_a_computed_weight_is_refused_at_load(
    make_model: Callable[..., bytes], open_model: Callable[..., onnxruntime.InferenceSession], library: Path
) -> None:
    feeds = SMALL.feeds()
    constants = constants_of(feeds)
    del constants["weight_qkv_scale"]
    model = make_model(SMALL.form, attributes=SMALL.attributes, constants=constants, with_body=False)
    with pytest.raises(Exception, match="weight_qkv_scale is not a constant"):
        open_model(model, library=library)


def test_another_number_of_tokens_is_an_error_of_the_call(run_form: Callable) -> None:
    feeds = SMALL.feeds()
    with pytest.raises(Exception, match=r"node 'block/node': x has shape \[1,20,18\]; expected \[batch,21,18\]"):
        run_form(SMALL.form, {"x": feeds["x"][:, :-1]}, attributes=SMALL.attributes, constants=constants_of(feeds))
