"""Attention and PackedAttention as nodes of a model: which code runs them, on how many threads, what is said about bad
inputs, and what the graph knows of the output's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from attention_inputs import ATTENTION_FORMS, Feeds, Sizes, assert_close, attributes_of, feeds_of

MakeModel = Callable[..., bytes]
OpenModel = Callable[..., onnxruntime.InferenceSession]
RunForm = Callable[..., list[np.ndarray]]

INDEXED = "PackedAttentionIndexed"
PADDED = "PackedAttentionIndexedPadded"


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_every_form_equals_its_reference_and_its_body(
    make_model: MakeModel, open_model: OpenModel, library: Path, form: str
) -> None:
    sizes = Sizes()
    feeds, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    model = make_model(form, attributes=attributes)
    (output,) = open_model(model, library=library).run(None, feeds)
    (body,) = open_model(model, library=None).run(None, feeds)
    assert_close(form, feeds, attributes, output)
    np.testing.assert_allclose(output, body, rtol=0, atol=5e-6)


THREADED = {
    "PackedAttention": Sizes(batch=1, query_len=197, heads=3, head_dim=32),
    "AttentionCausalMask": Sizes(batch=2, query_len=130, key_len=150, heads=2),
    "PackedAttentionIndexedPaddedBias": Sizes(batch=2, query_len=25, windows=9, heads=3),
    "AttentionGrouped": Sizes(batch=1, query_len=300, key_len=1500, heads=2, head_dim=64, value_dim=64),
}


@pytest.mark.parametrize("form", THREADED)
def test_any_number_of_threads_gives_the_same_bits(run_form: RunForm, form: str) -> None:
    sizes = THREADED[form]
    feeds, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    (one,) = run_form(form, feeds, attributes=attributes, threads=1)
    assert_close(form, feeds, attributes, one)
    for threads in (2, 3, 8):
        for _ in range(3):
            (output,) = run_form(form, feeds, attributes=attributes, threads=threads)
            np.testing.assert_array_equal(output, one)


@pytest.mark.parametrize("form", [INDEXED + "Bias", PADDED + "CosineBias"])
def test_an_index_map_that_is_a_constant_gives_the_same_bits(run_form: RunForm, form: str) -> None:
    sizes = Sizes(query_len=9, windows=5)
    feeds, attributes = feeds_of(form, sizes), attributes_of(form, sizes)
    (given,) = run_form(form, feeds, attributes=attributes)
    constants = {"index": feeds.pop("index"), "bias_index": feeds.pop("bias_index")}
    (constant,) = run_form(form, feeds, attributes=attributes, constants=constants)
    np.testing.assert_array_equal(constant, given)


def test_tokens_of_no_window_give_zero_whatever_was_in_memory(run_form: RunForm) -> None:
    sizes = Sizes(query_len=9, windows=5)
    feeds, attributes = feeds_of(PADDED, sizes), attributes_of(PADDED, sizes)
    left_out = sorted(set(range(attributes["tokens"])) - set(feeds["index"].ravel()))
    for threads in (1, 1, 2):
        (output,) = run_form(PADDED, feeds, attributes=attributes, threads=threads)
        assert (output[:, left_out] == 0).all()
        assert (np.delete(output, left_out, axis=1) != 0).all()
    feeds["index"] = np.full((2, 3), -1)
    (output,) = run_form(PADDED, feeds, attributes=attributes)
    assert (output == 0).all()


@pytest.mark.parametrize(
    ("form", "empty"),
    [
        ("PackedAttention", {"qkv": (0, 5, 3, 2, 4)}),
        ("PackedAttention", {"qkv": (2, 0, 3, 2, 4)}),
        ("PackedAttention", {"qkv": (2, 5, 3, 0, 4)}),
        ("Attention", {"query": (1, 0, 2, 4), "key": (1, 3, 2, 4), "value": (1, 3, 2, 5)}),
        ("Attention", {"query": (1, 3, 2, 4), "key": (1, 3, 2, 4), "value": (1, 3, 2, 0)}),
    ],
)
def test_an_empty_input_gives_an_empty_output(run_form: RunForm, form: str, empty: dict[str, tuple[int, ...]]) -> None:
    feeds = {name: np.ones(shape, np.float32) for name, shape in empty.items()}
    (output,) = run_form(form, feeds, attributes={"scale": 1.0})
    assert output.size == 0


def test_no_keys_give_zero(run_form: RunForm) -> None:
    feeds = {name: np.ones((1, length, 2, 4), np.float32) for name, length in
             (("query", 3), ("key", 0), ("value", 0))}  # fmt: skip
    np.testing.assert_array_equal(run_form("Attention", feeds, attributes={"scale": 1.0})[0], np.zeros((1, 3, 2, 4)))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


BAD_SHAPES: dict[str, tuple[str, Feeds, list[str]]] = {
    "qkv-rank": ("PackedAttention", {"qkv": ones(2, 3, 4, 5)}, ["[2,3,4,5]", "[batch, tokens, 3, heads, head_dim]"]),
    "qkv-parts": ("PackedAttention", {"qkv": ones(1, 5, 2, 3, 4)}, ["[1,5,2,3,4]"]),
    "bias-rank": ("PackedAttentionBias", {"bias": ones(13, 13)}, ["bias", "[13,13]", "[2,4,13,13]"]),
    "bias-dim": ("AttentionBias", {"bias": ones(2, 4, 13, 16)}, ["bias", "[2,4,13,16]", "[2,4,13,17]"]),
    "mask": ("AttentionMask", {"mask": np.ones((2, 3, 13, 17), bool)}, ["mask", "[2,3,13,17]", "[2,4,13,17]"]),
    "head_scale": ("AttentionCosine", {"head_scale": ones(3)}, ["head_scale", "[3]", "[4]"]),
    "head_dim": ("Attention", {"key": ones(2, 17, 4, 19)}, ["[2,17,4,19]", "same head_dim"]),
    "no-head_dim": ("Attention", {"query": ones(2, 3, 4, 0), "key": ones(2, 17, 4, 0)}, ["at least 1"]),
    "value-length": ("Attention", {"value": ones(2, 16, 4, 12)}, ["[2,16,4,12]", "same batch, length and heads"]),
    "batch": ("Attention", {"query": ones(3, 13, 4, 20)}, ["[3,13,4,20]", "one batch"]),
    "heads": ("Attention", {"query": ones(2, 13, 8, 20)}, ["[2,13,8,20]", "one batch and number of heads"]),
    "groups": ("AttentionGrouped", {"query": ones(2, 13, 3, 20)}, ["[2,13,3,20]", "kv_heads divides"]),
    "rank": ("Attention", {"query": ones(2, 13, 80)}, ["[2,13,80]", "[batch, len, heads, dim]"]),
    "tokens": (INDEXED, {"qkv": ones(1, 38, 3, 4, 20)}, ["38 tokens", "expected 39"]),
    "index-size": (INDEXED, {"index": np.arange(26).reshape(2, 13)}, ["index", "[2,13]", "39 tokens"]),
    "index-rank": (PADDED, {"index": np.arange(37)}, ["index", "[37]", "[windows, length]"]),
    "fill": (PADDED, {"fill": ones(3, 4, 19)}, ["fill", "[3,4,19]", "[3,4,20]"]),
    "windows_bias": (INDEXED + "Bias", {"windows_bias": ones(2, 4, 13, 12)}, ["[2,4,13,12]", "[2,4,13,13]"]),
    "bias_index": (INDEXED + "Bias", {"bias_index": np.zeros(4, np.int64)}, ["bias_index", "[4]", "[3]"]),
    "bias_index-value": (INDEXED + "Bias", {"bias_index": np.array([0, 2, 1])}, ["bias_index holds 2", "0 to 1"]),
    "index-high": (INDEXED, {"index": np.arange(1, 40).reshape(3, 13)}, ["index holds 39", "0 to 38"]),
    "index-low": (INDEXED, {"index": np.arange(-1, 38).reshape(3, 13)}, ["index holds -1", "0 to 38"]),
    "index-twice": (INDEXED, {"index": np.arange(39).reshape(3, 13) // 2}, ["index holds token 0 twice"]),
    "padded-low": (PADDED, {"index": np.full((3, 13), -2)}, ["index holds -2", "-1 to 36"]),
}


@pytest.mark.parametrize(("form", "bad", "parts"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_inputs_are_refused_with_the_node_name(
    make_model: MakeModel, open_model: OpenModel, library: Path, form: str, bad: Feeds, parts: list[str]
) -> None:
    good, attributes = feeds_of(form, Sizes()), attributes_of(form, Sizes())
    model = make_model(form, attributes=attributes, node_name="blocks.3/attention")
    session = open_model(model, library=library)
    with pytest.raises(Exception, match=f"{form} node 'blocks.3/attention': ") as caught:
        session.run(None, {**good, **bad})
    assert [part for part in parts if part not in str(caught.value)] == []
    # The session is none the worse for it.
    assert_close(form, good, attributes, session.run(None, good)[0])


@pytest.mark.parametrize("case", ["index-high", "index-low", "index-twice", "padded-low"])
def test_a_bad_constant_index_map_is_refused_at_load(
    make_model: MakeModel, open_model: OpenModel, library: Path, case: str
) -> None:
    form, bad, parts = BAD_SHAPES[case]
    model = make_model(form, attributes=attributes_of(form, Sizes()), constants=bad, node_name="stage/0")
    with pytest.raises(Exception, match=f"{form} node 'stage/0': {parts[0]}"):
        open_model(model, library=library)


def test_a_softcap_of_zero_is_refused_at_load(make_model: MakeModel, open_model: OpenModel, library: Path) -> None:
    model = make_model("AttentionSoftcap", attributes={"scale": 1.0, "softcap": 0.0})
    with pytest.raises(Exception, match="AttentionSoftcap node 'block/node': softcap is 0"):
        open_model(model, library=library)


@pytest.mark.parametrize(
    ("form", "shapes", "expected"),
    [
        ("PackedAttention", {"qkv": ["batch", "tokens", 3, 4, 8]}, ["batch", "tokens", 32]),
        ("PackedAttention", {"qkv": [2, 5, 3, 4, 8]}, [2, 5, 32]),
        ("PackedAttention", {"qkv": [2, 5, 3, "heads", 8]}, []),
        (INDEXED + "Bias", {"qkv": ["batch", 39, 3, 4, 8]}, ["batch", 39, 32]),
        ("Attention", {"query": ["n", "len", 4, 8], "value": ["n", "keys", 4, 9]}, ["n", "len", 4, 9]),
        ("Attention", {"query": ["n", "len", 4, 8]}, []),
    ],
)
def test_the_graph_knows_the_output_shape(
    make_model: MakeModel,
    open_model: OpenModel,
    library: Path,
    form: str,
    shapes: dict[str, list[str | int]],
    expected: list[str | int],
) -> None:
    model = make_model(form, attributes=attributes_of(form, Sizes()), shapes=shapes, with_body=False)
    assert open_model(model, library=library).get_outputs()[0].shape == expected
