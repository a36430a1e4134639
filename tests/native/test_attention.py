"""The attention kernels on every instruction set, against the float64 reference of attn_deploy/ops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_inputs import ATTENTION_FORMS, Attributes, Feeds, Sizes, assert_close, attributes_of, feeds_of, reference
from kernel_runner import Case, KernelRunner

from attn_deploy.ops import FORMS

Array = np.ndarray
LOWEST = np.float32(np.finfo(np.float32).min)

EDGES = (1, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 33, 64, 67)
"""One, around the lanes of every vector, a few vectors, primes."""

BEYOND_ONE_BLOCK = Sizes(batch=1, query_len=53, key_len=421, heads=1, head_dim=256, value_dim=250)
"""Keys of 256 and values of 250 numbers come in blocks of 128 keys."""


def case_of(form: str, feeds: Feeds, attributes: Attributes, *, parts: int = 0, misalignment: int = 0) -> Case:
    flags = ("Packed", "Indexed", "Padded", "Cosine", "Causal", "Bias", "Mask")
    inputs = [feeds[i.name] for i in FORMS[form].inputs]
    return Case(
        "attention",
        inputs,
        ints=[*(int(flag in form) for flag in flags), parts],
        floats=[attributes["scale"], attributes.get("softcap", 0.0)],
        misalignments=[misalignment] * len(inputs),
    )


def attend(run: KernelRunner, form: str, feeds: Feeds, attributes: Attributes, *, parts: int = 0) -> Array:
    return run([case_of(form, feeds, attributes, parts=parts)])[0][0]


def assert_all_close(run: KernelRunner, form: str, all_sizes: list[Sizes], *, misalignment: int = 0) -> None:
    all_feeds = [feeds_of(form, sizes, seed) for seed, sizes in enumerate(all_sizes)]
    attributes = [attributes_of(form, sizes) for sizes in all_sizes]
    cases = [case_of(form, f, a, misalignment=misalignment) for f, a in zip(all_feeds, attributes, strict=True)]
    for feeds, given, (output, _) in zip(all_feeds, attributes, run(cases), strict=True):
        assert_close(form, feeds, given, output)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_every_form_equals_its_reference(kernel_runner: KernelRunner, form: str) -> None:
    small = Sizes()
    assert_all_close(kernel_runner, form, [small, replace(small, query_len=49, key_len=35, head_dim=32, value_dim=24)])
    assert_all_close(kernel_runner, form, [replace(small, batch=1, query_len=2, key_len=1)], misalignment=1)


@pytest.mark.parametrize("form", ["Attention", "AttentionCausalBiasMask", "AttentionCosine"])
def test_every_edge_size_equals_the_reference(kernel_runner: KernelRunner, form: str) -> None:
    rng = np.random.default_rng(1)
    few = Sizes(batch=1, heads=1)
    sizes = [few]
    for name in ("query_len", "key_len", "head_dim", "value_dim"):
        sizes += [replace(few, **{name: edge}) for edge in EDGES]
    sizes += [Sizes(1, *rng.choice(EDGES, 2), 2, *rng.choice(EDGES, 2)) for _ in range(20)]
    assert_all_close(kernel_runner, form, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["Attention", "PackedAttention", "PackedAttentionIndexedPaddedBias"])
def test_every_pair_of_edge_sizes_equals_the_reference(kernel_runner: KernelRunner, form: str) -> None:
    few = Sizes(batch=1, heads=2, value_dim=9)
    lengths = [length for length in EDGES if length > 1]
    for head_dim in (*EDGES, 128, 300):
        sizes = [replace(few, query_len=a, key_len=b, head_dim=head_dim) for a in lengths for b in EDGES]
        assert_all_close(kernel_runner, form, sizes)


@pytest.mark.parametrize("form", ["PackedAttention", "AttentionCausal", "PackedAttentionIndexedPaddedBias"])
def test_any_split_of_the_rows_and_any_misalignment_gives_the_same_bits(kernel_runner: KernelRunner, form: str) -> None:
    sizes = Sizes(query_len=50, key_len=61, head_dim=33, value_dim=19)
    feeds, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    whole = attend(kernel_runner, form, feeds, attributes, parts=1)
    assert_close(form, feeds, attributes, whole)
    cases = [case_of(form, feeds, attributes, parts=parts) for parts in (0, 2, 3, 7, 50)]
    cases += [case_of(form, feeds, attributes, misalignment=misalignment) for misalignment in (1, 2, 3)]
    for output, _ in kernel_runner(cases):
        np.testing.assert_array_equal(output, whole)


@pytest.mark.parametrize("shape", [(2, 4, 13, 17), (1, 4, 1, 17), (2, 1, 13, 1), (1, 1, 1, 1), (1, 1, 13, 17)])
def test_bias_and_mask_broadcast(kernel_runner: KernelRunner, shape: tuple[int, ...]) -> None:
    form, rng = "AttentionBiasMask", np.random.default_rng(2)
    feeds, attributes = feeds_of(form, Sizes()), attributes_of(form, Sizes())
    feeds["bias"] = rng.standard_normal(shape, dtype=np.float32)
    feeds["mask"] = rng.random(shape) < 0.7
    assert_close(form, feeds, attributes, attend(kernel_runner, form, feeds, attributes))


STREAMING_FORMS = ["Attention", "AttentionCausal", "AttentionSoftcapCausalBiasMask", "AttentionCosine"]


@pytest.mark.parametrize("form", STREAMING_FORMS)
def test_keys_that_come_in_blocks_give_the_same_result(kernel_runner: KernelRunner, form: str) -> None:
    sizes = BEYOND_ONE_BLOCK
    assert_all_close(kernel_runner, form, [sizes, replace(sizes, query_len=421), replace(sizes, key_len=193)])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_maxima_that_rise_or_fall_from_block_to_block(kernel_runner: KernelRunner, order: int, size: float) -> None:
    """Each key's score is larger, or smaller, than the one before; 4e6 apart at the ends of the large ones."""
    form, sizes = "Attention", BEYOND_ONE_BLOCK
    feeds, attributes = feeds_of(form, sizes), {"scale": 1.0}
    feeds["query"] = np.zeros_like(feeds["query"])
    feeds["query"][..., 0] = 1.0
    feeds["key"][..., 0] = (size * np.arange(sizes.key_len)[::order])[None, :, None]
    output = attend(kernel_runner, form, feeds, attributes)
    np.testing.assert_allclose(output, reference(form, feeds, attributes), rtol=0, atol=2e-4 if size == 1.0 else 1e-6)


@pytest.mark.parametrize("seen", [slice(0, 0), slice(0, 1), slice(200, 210), slice(420, 421)])
@pytest.mark.parametrize("sizes", [Sizes(key_len=421), BEYOND_ONE_BLOCK], ids=["one-block", "blocks"])
def test_rows_that_see_few_keys_or_none(kernel_runner: KernelRunner, sizes: Sizes, seen: slice) -> None:
    """Whole blocks are masked: before, behind and around what a row sees. A row that sees nothing gives exactly 0."""
    form = "AttentionMask"
    feeds, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    feeds["mask"][:, :, ::2, :] = False
    feeds["mask"][:, :, ::2, seen] = True
    output = attend(kernel_runner, form, feeds, attributes)
    assert_close(form, feeds, attributes, output)
    blind = ~feeds["mask"].any(axis=-1)[:, 0]
    assert (output[blind] == 0).all()
    assert (output[~blind] != 0).all()


@pytest.mark.parametrize("sizes", [Sizes(), BEYOND_ONE_BLOCK], ids=["one-block", "blocks"])
def test_minus_infinity_in_the_bias_masks(kernel_runner: KernelRunner, sizes: Sizes) -> None:
    feeds, attributes = feeds_of("AttentionMask", sizes), attributes_of("AttentionMask", sizes)
    masked = attend(kernel_runner, "AttentionMask", feeds, attributes)
    feeds["bias"] = np.where(feeds["mask"], np.float32(0), np.float32(-np.inf))
    np.testing.assert_array_equal(attend(kernel_runner, "AttentionBias", feeds, attributes), masked)


@pytest.mark.parametrize("lowest", [LOWEST, LOWEST / 2, np.float32(-1e4)])
@pytest.mark.parametrize("sizes", [Sizes(), BEYOND_ONE_BLOCK], ids=["one-block", "blocks"])
def test_the_lowest_number_in_the_bias_masks_unless_it_is_everywhere(
    kernel_runner: KernelRunner, sizes: Sizes, lowest: np.float32
) -> None:
    """What transformers put into float masks; a row of nothing else is softmax of its scores, or the mean of values."""
    form = "AttentionBias"
    feeds, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    feeds["bias"] = np.zeros_like(feeds["bias"])
    feeds["bias"][..., 5:] = lowest
    feeds["bias"][:, :, 1] = lowest
    output = attend(kernel_runner, form, feeds, attributes)
    np.testing.assert_allclose(output, reference(form, feeds, attributes), rtol=0, atol=2e-3 if lowest > -1e5 else 1e-5)


def test_huge_scores_choose_the_largest(kernel_runner: KernelRunner) -> None:
    for size in (1e4, 1e17, 1e18):
        feeds = feeds_of("Attention", Sizes())
        for name in ("query", "key"):
            feeds[name] = (feeds[name] * np.float32(size)).astype("f4")
        output = attend(kernel_runner, "Attention", feeds, {"scale": 1.0})
        assert np.isfinite(output).all()
        np.testing.assert_allclose(output, reference("Attention", feeds, {"scale": 1.0}), rtol=1e-5, atol=1e-6)


def test_one_key_gives_its_value_exactly(kernel_runner: KernelRunner) -> None:
    feeds = feeds_of("Attention", Sizes(key_len=1))
    output = attend(kernel_runner, "Attention", feeds, {"scale": 3.0})
    np.testing.assert_array_equal(output, np.broadcast_to(feeds["value"], output.shape))


@pytest.mark.parametrize("sizes", [Sizes(), BEYOND_ONE_BLOCK], ids=["one-block", "blocks"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_reach_what_reads_them_and_nothing_else(
    kernel_runner: KernelRunner, sizes: Sizes, bad: float
) -> None:
    form = "AttentionMask"
    clean, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    clean["mask"][:, :, :, 2] = False
    clean["mask"][:, :, ::2, -1] = False
    seen = clean["mask"][0, 0]
    for name, token in (("query", 4), ("key", 3), ("key", 2), ("key", sizes.key_len - 1), ("value", 5)):
        feeds = {key: array.copy() for key, array in clean.items()}
        feeds[name][0, token, 0, 1] = bad
        if name == "key":
            feeds["query"][..., 1] = 1.0  # so that infinity in a key is one in the score
        (output, _), (good, _) = kernel_runner(
            [case_of(form, f, attributes) for f in (feeds, {**feeds, name: clean[name]})]
        )
        reached = np.zeros(output.shape, bool)
        if name == "query":
            reached[0, token, 0] = True
        elif name == "key":
            reached[0, seen[:, token], 0] = True
        else:  # with weight 0 too, as in any product of matrices
            reached[0, :, 0, 1] = True
        assert not np.isfinite(output[reached]).any() or (name == "value" and bad == np.inf)
        np.testing.assert_array_equal(output[~reached], good[~reached])


def test_weights_are_as_exact_as_scores_are(kernel_runner: KernelRunner) -> None:
    """Scores 0 and s: the value of the second key is read with weight e^s / (1 + e^s). Allowed: 3 units in the last
    place (2 of 2^v, 1 of the division), and those of the product v = s * log2(e)."""
    s = -np.concatenate([np.linspace(0, 86, 20_001), np.logspace(-30, 0, 2_000)]).astype("f4")
    feeds = {"query": np.ones((1, 1, s.size, 1), "f4"), "key": np.zeros((1, 2, s.size, 1), "f4"),
             "value": np.zeros((1, 2, s.size, 1), "f4")}  # fmt: skip
    feeds["key"][0, 1, :, 0] = s
    feeds["value"][0, 1] = 1.0
    output = attend(kernel_runner, "Attention", feeds, {"scale": 1.0})[0, 0, :, 0]
    exact = np.exp(s.astype(np.float64)) / (1 + np.exp(s.astype(np.float64)))
    eps = np.finfo(np.float32).eps
    assert (np.abs(output - exact) <= (3 + 0.65 * np.abs(s)) * eps * exact).all()


def test_scratch_memory_does_not_grow_with_the_length(kernel_runner: KernelRunner) -> None:
    def run(tokens: int) -> int:
        sizes = Sizes(batch=1, query_len=tokens, heads=1, head_dim=8)
        feeds = feeds_of("PackedAttention", sizes)
        output, scratch = kernel_runner([case_of("PackedAttention", feeds, {"scale": 0.3})])[0]
        rows = np.r_[0:3, tokens // 2 : tokens // 2 + 3, tokens - 3 : tokens]
        of_rows = {"query": feeds["qkv"][:, rows, 0], "key": feeds["qkv"][:, :, 1], "value": feeds["qkv"][:, :, 2]}
        expected = reference("Attention", of_rows, {"scale": 0.3})
        np.testing.assert_allclose(output[:, rows], expected.reshape(1, len(rows), -1), rtol=0, atol=1e-6)
        return int(scratch[0])

    assert run(8192) == run(16384) <= 2**18  # a megabyte
