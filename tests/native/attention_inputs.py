"""Random inputs of every form of Attention and PackedAttention, for the tests of kernels and of operators."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attn_deploy.ops import FORMS

Array = np.ndarray
Feeds = dict[str, Array]
Attributes = dict[str, float | int]

ATTENTION_FORMS = [name for name, form in FORMS.items() if form.operator in ("Attention", "PackedAttention")]


@dataclass(frozen=True)
class Sizes:
    """Packed forms take query_len tokens and head_dim for all; indexed ones windows of query_len tokens. Padded ones
    have a place of padding in every window and a token that stands in no window."""

    batch: int = 2
    query_len: int = 13
    key_len: int = 17
    heads: int = 4
    head_dim: int = 20
    value_dim: int = 12
    windows: int = 3


def attributes_of(form: str, sizes: Sizes) -> Attributes:
    values = {"scale": 0.3, "softcap": 2.0, "tokens": _tokens(form, sizes)}
    return {name: values[name] for name in FORMS[form].attributes}


def feeds_of(form: str, sizes: Sizes, seed: int = 0) -> Feeds:
    """Standard normal numbers; a mask that shows six keys of ten, and none to row 3 of the first sample."""
    s, rng = sizes, np.random.default_rng(seed)
    packed = form.startswith("Packed")
    key_len = s.query_len if packed else s.key_len
    kv_heads = s.heads // 2 if "Grouped" in form else s.heads
    shapes = {
        "qkv": (s.batch, _tokens(form, s), 3, s.heads, s.head_dim),
        "query": (s.batch, s.query_len, s.heads, s.head_dim),
        "key": (s.batch, key_len, kv_heads, s.head_dim),
        "value": (s.batch, key_len, kv_heads, s.value_dim),
        "fill": (3, s.heads, s.head_dim),
        "head_scale": (s.heads,),
        "bias": (s.batch, s.heads, s.query_len, key_len),
        "windows_bias": (2, s.heads, s.query_len, s.query_len),
    }
    feeds: Feeds = {}
    for given in FORMS[form].inputs:
        if given.name == "index":
            feeds["index"] = _index(form, s, rng)
        elif given.name == "bias_index":
            feeds["bias_index"] = rng.integers(0, 2, s.windows)
        elif given.name == "mask":
            mask = rng.random((s.batch, 1, s.query_len, key_len)) < 0.6
            mask[0, 0, min(3, s.query_len - 1)] = False
            feeds["mask"] = mask
        else:
            feeds[given.name] = rng.standard_normal(shapes[given.name], dtype=np.float32)
    return feeds


def reference(form: str, feeds: Feeds, attributes: Attributes) -> Array:
    with np.errstate(all="ignore"):
        return FORMS[form].reference(*(feeds[i.name] for i in FORMS[form].inputs), **attributes)[0]


def assert_close(form: str, feeds: Feeds, attributes: Attributes, output: Array) -> None:
    """Allowed: float32 roundings of a score, which is a sum of products, and of the weights and their sum; both count
    as much as the largest value does."""
    expected = reference(form, feeds, attributes)
    if "qkv" in feeds:
        q, k, v = np.moveaxis(np.abs(feeds["qkv"].astype(np.float64)), 2, 0)
    else:
        q, k, v = (np.abs(feeds[name].astype(np.float64)) for name in ("query", "key", "value"))
    products = q.max(axis=(0, 1, 2)) @ k.max(axis=(0, 1, 2)) * abs(attributes["scale"])
    if "head_scale" in feeds:
        products = np.abs(feeds["head_scale"]).max() * abs(attributes["scale"])
    largest = max(v.max(), np.abs(feeds["fill"]).max() if "fill" in feeds else 0.0)
    allowed = np.finfo(np.float32).eps * (4 + products) * largest
    assert output.dtype == np.float32
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, rtol=0, atol=allowed)


def _tokens(form: str, s: Sizes) -> int:
    if "Padded" in form:
        return s.windows * (s.query_len - 1) + 1
    return s.windows * s.query_len if "Indexed" in form else s.query_len


def _index(form: str, s: Sizes, rng: np.random.Generator) -> Array:
    if "Padded" not in form:
        return rng.permutation(s.windows * s.query_len).reshape(s.windows, s.query_len)
    tokens = rng.permutation(s.windows * (s.query_len - 1) + 1)[1:].reshape(s.windows, s.query_len - 1)
    return np.concatenate([tokens, np.full((s.windows, 1), -1)], axis=1)
