"""Targets and precisions as text, and the suggestion for a misspelt name."""

from __future__ import annotations

import pytest

from attn_deploy.errors import UsageError
from attn_deploy.target import Precision, Target, nearest, parse_precision, parse_target


@pytest.mark.parametrize("target", Target, ids=str)
def test_a_target_is_read_with_dashes_and_with_underscores(target: Target) -> None:
    assert parse_target(str(target)) is target
    assert parse_target(str(target).replace("-", "_")) is target


@pytest.mark.parametrize("precision", Precision, ids=str)
def test_a_precision_is_read_from_its_name(precision: Precision) -> None:
    assert parse_precision(str(precision)) is precision


def test_a_misspelt_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        parse_target("onnxrutime-cpu")
    assert caught.value.got == "onnxrutime-cpu"
    assert caught.value.expected == "did you mean onnxruntime-cpu or onnxruntime-cuda?"


def test_a_misspelt_precision_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        parse_precision("int-8")
    assert caught.value.got == "int-8"
    assert "int8" in str(caught.value.expected)


@pytest.mark.parametrize("text", ["", "INT8", "onnxruntime-cpu:fp32"])
def test_a_precision_that_is_near_to_none_names_them_all(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_precision(text)
    assert caught.value.expected == "one of: auto, bf16, fp16, fp32, fp8, int8"


def test_nearest_offers_at_most_three() -> None:
    assert nearest("layer1", [f"layer{n}" for n in range(10)]).count(" or ") == 2


def test_nearest_lists_what_is_known_when_nothing_is_near() -> None:
    assert nearest("zebra", ["head", "stem"]) == "one of: head, stem"


def test_nearest_cuts_a_long_list_and_says_so() -> None:
    text = nearest("zebra", [f"block{n:02d}" for n in range(20)])
    assert text.startswith("one of: block00, block01,")
    assert text.endswith("block11, ...")
    assert "block12" not in text
