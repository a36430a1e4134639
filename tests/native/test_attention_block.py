"""The attention block over windows, as a kernel and as an operator, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from kernel_runner import Case, KernelRunner

from attn_deploy.ops import FORMS

FORM_NAMES = [
    "AttentionBlockIndexed" + padded + cosine + bias
    for padded in ("", "Padded")
    for cosine in ("", "Cosine")
    for bias in ("", "Bias")
]
OUTSIDE = 2
"""Tokens of no window, in the padded forms."""


@dataclass(frozen=True)
class Sizes:
    batch: int
    windows: int
    length: int
    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


# Windows of 1, 7 and 49 tokens; channels around the columns of a panel (16 or 32) and not a multiple of a vector.
SIZES = [
    Sizes(1, 1, 1, 1, 1),
    Sizes(2, 3, 7, 2, 9),
    Sizes(1, 5, 9, 3, 16),
    Sizes(1, 2, 49, 3, 32),
    Sizes(3, 4, 16, 1, 33),
]


def feeds_of(form: str, s: Sizes, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, float | int]]:
    """Inputs in the form's order, and its attributes. Padding stands in every window but the first."""
    rng = np.random.default_rng(seed)
    padded = "Padded" in form

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    places = s.windows * s.length
    empty = min(s.windows - 1, places - 1) if padded else 0
    tokens = places - empty + (OUTSIDE if padded else 0)
    index = np.concatenate([rng.permutation(tokens)[: places - empty], np.full(empty, -1)])
    index = np.roll(index, 1).reshape(s.windows, s.length).astype(np.int64)
    c = s.channels
    values = {
        "x": 3 + normal(s.batch, tokens, c),
        "norm_scale": 1 + normal(c, size=0.2),
        "norm_bias": normal(c, size=0.2),
        "weight_qkv": normal(c, 3 * c, size=c**-0.5),
        "bias_qkv": normal(3 * c, size=0.3),
        "weight_out": normal(c, c, size=c**-0.5),
        "bias_out": normal(c, size=0.3),
        "index": index,
        "fill": normal(3, s.heads, s.head_dim),
        "head_scale": 2 + np.abs(normal(s.heads)),
        "windows_bias": normal(2, s.heads, s.length, s.length),
        "bias_index": rng.integers(0, 2, s.windows),
    }
    attributes = {"epsilon": 1e-5, "heads": s.heads, "scale": 0.3, "tokens": tokens}
    return {i.name: values[i.name] for i in FORMS[form].inputs}, attributes


def assert_close(form: str, feeds: dict[str, np.ndarray], attributes: dict, output: np.ndarray) -> None:
    (expected,) = FORMS[form].reference(*feeds.values(), **attributes)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_kernel_equals_the_reference(kernel_runner: KernelRunner, form: str) -> None:
    cases, made = [], []
    for sizes in SIZES:
        for together in (1, 2):
            feeds, attributes = feeds_of(form, sizes)
            feeds["norm_scale"][:], feeds["norm_bias"][:] = 1, 0  # the operator makes them part of the weights
            flags = [int(word in form) for word in ("Padded", "Cosine", "Bias")]
            made.append((feeds, attributes))
            cases.append(
                Case(
                    "attention_block",
                    list(feeds.values()),
                    ints=[*flags, sizes.heads, together],
                    floats=[attributes["epsilon"], attributes["scale"]],
                    misalignments=[1 if v.dtype == np.float32 else 0 for v in feeds.values()],
                )
            )
    for (feeds, attributes), (output,) in zip(made, kernel_runner(cases), strict=True):
        assert_close(form, feeds, attributes, output)


def constants_of(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in feeds.items() if name != "x"}


@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_operator_gives_the_same_bits_on_any_number_of_threads(run_form: Callable, form: str) -> None:
    feeds, attributes = feeds_of(form, Sizes(2, 16, 9, 2, 8))
    outputs = [
        run_form(form, {"x": feeds["x"]}, threads=threads, attributes=attributes, constants=constants_of(feeds))[0]
        for threads in (1, 2, 3, 8)
    ]
    assert_close(form, feeds, attributes, outputs[0])
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_no_sample_gives_no_output(run_form: Callable) -> None:
    feeds, attributes = feeds_of("AttentionBlockIndexed", Sizes(1, 3, 7, 2, 9))
    empty = feeds["x"][:0]
    (output,) = run_form("AttentionBlockIndexed", {"x": empty}, attributes=attributes, constants=constants_of(feeds))
    assert output.shape == empty.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": lambda v: np.where(v == 0, 1, v)}, "twice"),
        ({"index": lambda v: v + 1}, "expected 0 to"),
        ({"norm_bias": lambda v: v[:-1]}, r"norm_bias .*shape \[17\]; expected float32 \(1\) of shape \[18\]"),
        ({"weight_out": lambda v: v[:, :-1]}, r"weight_out is \[18,17\]|bias_out has"),
        ({"bias_index": lambda v: v + 2}, "bias_index holds"),
    ],
)
def test_constants_that_do_not_fit_are_refused_at_load(
    run_form: Callable, change: dict[str, Callable], message: str
) -> None:
    feeds, attributes = feeds_of("AttentionBlockIndexedBias", Sizes(1, 3, 7, 2, 9))
    constants = constants_of(feeds)
    for name, changed in change.items():
        constants[name] = changed(constants[name])
    with pytest.raises(Exception, match=f"(?s)AttentionBlockIndexedBias node 'block/node'.*{message}"):
        run_form("AttentionBlockIndexedBias", {"x": feeds["x"]}, attributes=attributes, constants=constants)


def test_a_computed_weight_is_refused_at_load(
    make_model: Callable[..., bytes], open_model: Callable[..., onnxruntime.InferenceSession], library: Path
) -> None:
    feeds, attributes = feeds_of("AttentionBlockIndexed", Sizes(1, 3, 7, 2, 9))
    constants = constants_of(feeds)
    del constants["weight_qkv"]
    model = make_model("AttentionBlockIndexed", attributes=attributes, constants=constants, with_body=False)
    with pytest.raises(Exception, match="weight_qkv is not a constant"):
        open_model(model, library=library)


def test_another_number_of_tokens_is_an_error_of_the_call(run_form: Callable) -> None:
    feeds, attributes = feeds_of("AttentionBlockIndexed", Sizes(1, 3, 7, 2, 9))
    with pytest.raises(Exception, match=r"node 'block/node': x has shape \[1,20,18\]; expected \[batch,21,18\]"):
        run_form(
            "AttentionBlockIndexed", {"x": feeds["x"][:, :-1]}, attributes=attributes, constants=constants_of(feeds)
        )
