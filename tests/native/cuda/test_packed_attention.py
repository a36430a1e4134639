"""The PackedAttention kernels' numbers on the emulated GPU, against the float64 reference of attn_deploy/ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attn_deploy.ops import FORMS

RunForm = Callable[..., list[np.ndarray]]
RoundTo = Callable[[np.ndarray, str], np.ndarray]
Feeds = dict[str, np.ndarray]

DTYPES = ("float32", "float16", "bfloat16")
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
PLAIN_FORMS = [name for name, f in FORMS.items() if f.operator == "PackedAttention" and "Indexed" not in name]
INDEXED_FORMS = [name for name, f in FORMS.items() if f.operator == "PackedAttention" and "Indexed" in name]


def window_index(rng: np.random.Generator, tokens: int, windows: int, length: int, padded: bool) -> np.ndarray:
    """Every token once in a random place; what is left is padding. With padding one token stands nowhere."""
    places = np.full(windows * length, -1, np.int64)
    chosen = rng.permutation(tokens)[int(padded) :]
    places[rng.permutation(windows * length)[: len(chosen)]] = chosen
    return places.reshape(windows, length)


def attention_feeds(
    form: str,
    round_to: RoundTo,
    dtype: str,
    *,
    batch: int = 1,
    length: int = 49,
    heads: int = 2,
    head_dim: int = 32,
    windows: int = 1,
    padding: int = 0,
    broadcast: tuple[int, ...] = (),
    seed: int = 0,
) -> Feeds:
    """Inputs whose softmax is peaked. `broadcast` names the dims of a plain form's bias and mask that are 1."""
    rng = np.random.default_rng(seed)
    indexed = "Indexed" in form
    tokens = windows * length - padding if indexed else length
    full = tuple(1 if d in broadcast else n for d, n in enumerate((batch, heads, length, length)))
    mask = rng.random(full) < 0.6
    mask[:, :, : 1 + length // 8] = False  # queries that see nothing
    made: dict[str, Callable[[], np.ndarray]] = {
        "qkv": lambda: 2 * rng.standard_normal((batch, tokens, 3, heads, head_dim)),
        "index": lambda: window_index(rng, tokens, windows, length, "Padded" in form),
        "fill": lambda: rng.standard_normal((3, heads, head_dim)),
        "head_scale": lambda: rng.uniform(4, 12, heads),
        "bias": lambda: rng.standard_normal(full),
        "windows_bias": lambda: rng.standard_normal((2, heads, length, length)),
        "bias_index": lambda: rng.integers(0, 2, windows),
        "mask": lambda: mask,
    }
    feeds = {}
    for operand in FORMS[form].inputs:
        value = made[operand.name]()
        feeds[operand.name] = round_to(value, dtype) if operand.dtype == "float32" else value
    return feeds


def attributes_of(form: str, feeds: Feeds) -> dict[str, Any]:
    qkv = feeds["qkv"]
    values = {"scale": 1.0 if "Cosine" in form else qkv.shape[-1] ** -0.5, "softcap": 5.0, "tokens": qkv.shape[1]}
    return {name: values[name] for name in FORMS[form].attributes}


def assert_close(form: str, dtype: str, feeds: Feeds, output: np.ndarray) -> None:
    """Allowed, as a part of the largest value: a rounding of every weight and of the result to `dtype`; the scores,
    which are float32 for every type, lose some bits more: exp() turns their rounding into a relative error."""
    (expected,) = FORMS[form].reference(*feeds.values(), **attributes_of(form, feeds))
    largest = max(float(np.abs(feeds[name]).max()) for name in ("qkv", "fill") if name in feeds)
    allowed = largest * (2.0 * ROUNDING[dtype] + 2.0**-18)
    assert output.shape == expected.shape
    assert np.isfinite(output).all()
    assert np.abs(output - expected).max() <= allowed
    assert np.abs(expected).max() > 100 * ROUNDING["bfloat16"] * largest / 8  # not lost in what is allowed


def check(run_form: RunForm, form: str, dtype: str, feeds: Feeds, **device: Any) -> None:
    (output,) = run_form(form, dtype, feeds, **device, **attributes_of(form, feeds))
    assert_close(form, dtype, feeds, output)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 49, 64, 65, 144])
def test_window_lengths(run_form: RunForm, gpu: object, round_to: RoundTo, length: int, dtype: str) -> None:
    form = "PackedAttentionIndexedBias"
    check(run_form, form, dtype, attention_feeds(form, round_to, dtype, length=length, windows=2, heads=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 8, 12, 16, 24, 40, 64, 72, 96, 128])
def test_head_dims(run_form: RunForm, gpu: object, round_to: RoundTo, head_dim: int, dtype: str) -> None:
    form = "PackedAttentionIndexedPadded"
    feeds = attention_feeds(form, round_to, dtype, length=19, windows=2, head_dim=head_dim, padding=5)
    check(run_form, form, dtype, feeds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", INDEXED_FORMS)
def test_every_indexed_form(run_form: RunForm, gpu: object, round_to: RoundTo, form: str, dtype: str) -> None:
    padding = 9 if "Padded" in form else 0
    feeds = attention_feeds(form, round_to, dtype, batch=2, length=20, windows=3, heads=1, padding=padding)
    check(run_form, form, dtype, feeds)


@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_every_plain_form(run_form: RunForm, gpu: object, round_to: RoundTo, form: str) -> None:
    """In float16; the other types differ from it only in what the tests above cover."""
    check(run_form, form, "float16", attention_feeds(form, round_to, "float16", batch=2, length=21, heads=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["PackedAttentionSoftcapCausalBiasMask", "PackedAttentionCosineBiasMask"])
def test_several_tiles_of_keys_with_everything(
    run_form: RunForm, gpu: object, round_to: RoundTo, form: str, dtype: str
) -> None:
    feeds = attention_feeds(form, round_to, dtype, length=131, heads=1, head_dim=16)
    check(run_form, form, dtype, feeds)


@pytest.mark.parametrize("broadcast", [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_bias_and_mask_broadcast(run_form: RunForm, gpu: object, round_to: RoundTo, broadcast: tuple[int, ...]) -> None:
    form = "PackedAttentionBiasMask"
    feeds = attention_feeds(form, round_to, "float16", batch=2, length=10, heads=2, head_dim=8, broadcast=broadcast)
    feeds["mask"][..., 0] = True
    check(run_form, form, "float16", feeds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_gives_exactly_zero(
    run_form: RunForm, gpu: object, round_to: RoundTo, dtype: str
) -> None:
    form = "PackedAttentionMask"
    feeds = attention_feeds(form, round_to, dtype, length=70, heads=1, head_dim=16)
    feeds["mask"][:, :, 3] = False
    feeds["mask"][:, :, 66] = False
    (output,) = run_form(form, dtype, feeds, **attributes_of(form, feeds))
    np.testing.assert_array_equal(output[:, [3, 66]], 0)
    assert (output[:, 69] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is_seen(run_form: RunForm, gpu: object, round_to: RoundTo, dtype: str) -> None:
    form = "PackedAttentionIndexed"
    feeds = attention_feeds(form, round_to, dtype, length=17, windows=2, heads=2)
    feeds["qkv"][0, feeds["index"][1, 3], 1, 0] = np.nan  # a key of window 1 and head 0
    (output,) = run_form(form, dtype, feeds, **attributes_of(form, feeds))
    by_head = output[0].reshape(-1, 2, 32)
    assert np.isnan(by_head[feeds["index"][1], 0]).all()
    assert np.isfinite(by_head[feeds["index"][0]]).all()
    assert np.isfinite(by_head[:, 1]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_large_scores_neither_overflow_nor_lose_the_largest(
    run_form: RunForm, gpu: object, round_to: RoundTo, dtype: str
) -> None:
    """Scores of some 10^6 are beyond float16; the softmax is a one-hot."""
    form = "PackedAttentionIndexed"
    feeds = attention_feeds(form, round_to, dtype, length=49, windows=1, heads=1)
    feeds["qkv"] = round_to(feeds["qkv"] * 100, dtype)
    check(run_form, form, dtype, feeds)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["PackedAttentionIndexedPaddedCosineBias", "PackedAttentionIndexedBias"])
def test_threads_may_run_in_any_order(
    run_form: RunForm, gpu: Any, round_to: RoundTo, form: str, dtype: str, order: int
) -> None:
    """Three samples to a block and two tiles of keys: what is not behind a barrier is seen too early or too late."""
    padding = 3 if "Padded" in form else 0
    feeds = attention_feeds(form, round_to, dtype, batch=3, length=66, heads=1, head_dim=16, padding=padding)
    attributes = attributes_of(form, feeds)
    (in_order,) = run_form(form, dtype, feeds, **attributes)
    assert_close(form, dtype, feeds, in_order)
    gpu.set(order=order)
    np.testing.assert_array_equal(run_form(form, dtype, feeds, **attributes)[0], in_order)


@pytest.mark.parametrize("multiprocessors", [1, 2, 100])
@pytest.mark.parametrize("form", ["PackedAttentionIndexedBias", "PackedAttentionBias"])
def test_samples_may_share_blocks(
    run_form: RunForm, gpu: Any, round_to: RoundTo, form: str, multiprocessors: int
) -> None:
    """8 blocks wanted per multiprocessor: the 11 samples go 11, 6 or 1 to a block."""
    feeds = attention_feeds(form, round_to, "float16", batch=11, length=9, windows=8, heads=1, head_dim=8)
    gpu.set(multiprocessors=multiprocessors)
    check(run_form, form, "float16", feeds, device=(multiprocessors, 90))


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_bfloat16_without_tensor_cores_for_it(run_form: RunForm, gpu: Any, round_to: RoundTo, head_dim: int) -> None:
    form = "PackedAttentionIndexedBias"
    feeds = attention_feeds(form, round_to, "bfloat16", length=50, windows=1, heads=1, head_dim=head_dim)
    gpu.set(compute_capability=75)
    check(run_form, form, "bfloat16", feeds, device=(1, 75))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "head_dim"), [(196, 32), (256, 32), (197, 64), (400, 64), (130, 128)])
def test_long_windows(
    run_form: RunForm, gpu: object, round_to: RoundTo, length: int, head_dim: int, dtype: str
) -> None:
    form = "PackedAttentionIndexedBias"
    check(run_form, form, dtype, attention_feeds(form, round_to, dtype, length=length, head_dim=head_dim, heads=1))
