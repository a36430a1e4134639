"""Every attention form, lowered for TensorRT: the numbers of the float64 reference, in what TensorRT fuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.tensorrt import AttentionForm, attention_forms, default_attention, lower, standard
from attn_deploy.export.lower.tensorrt_attention import OPERATORS
from attn_deploy.ops import FORMS
from attn_deploy.parity import sqnr_db
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for tensorrt_models

from tensorrt_models import (
    SCALE,
    TOKENS,
    WINDOWS,
    attributes,
    canonical,
    constants_of_windows,
    expected,
    on_the_scores,
    open_model,
    operands,
    operator_counts,
)

FLOAT = ir.DataType.FLOAT
NAMES = [name for name, form in FORMS.items() if form.operator in OPERATORS]
MIN_DB = 110.0
"""FP32 against float64 on a few hundred terms: 130 dB and more were measured."""


def lowered(name: str, form: AttentionForm, *, unseen: bool = True, head_dim: int = 16) -> ir.Model:
    given = operands(name, 2, unseen=unseen, head_dim=head_dim)
    model = canonical(name, given, constants_of_windows(name), **attributes(name))
    return lower(model, Precision.FP32, attention=form).model


@pytest.mark.parametrize("form", AttentionForm)
@pytest.mark.parametrize("name", NAMES)
def test_a_form_gives_the_reference_at_every_batch(name: str, form: AttentionForm) -> None:
    model = lowered(name, form)
    run = open_model(model)
    constant = {k: v for k, v in operands(name, 2).items() if k in constants_of_windows(name)}
    for batch in (1, 3):
        given = operands(name, batch, seed=batch) | constant
        (got,) = run(given).values()
        assert np.isfinite(got).all()
        assert sqnr_db(expected(name, given), got) >= MIN_DB


@pytest.mark.parametrize("form", AttentionForm)
@pytest.mark.parametrize("name", NAMES)
def test_a_form_has_nothing_but_an_addition_on_its_scores_and_no_shapes_to_compute(
    name: str, form: AttentionForm
) -> None:
    model = lowered(name, form)
    counts = operator_counts(model)
    assert on_the_scores(model) == [] or "Softcap" in name
    assert not counts.keys() & {"Shape", "Size", "ConstantOfShape", "Range", "ScatterElements", "Trilu"}
    onnx.checker.check_model(ir.to_proto(standard(model)), full_check=True)
    fused = form is AttentionForm.OPERATOR and "Softcap" not in name
    assert (counts["Attention"], counts["Softmax"], counts["MatMul"]) == ((1, 0, 0) if fused else (0, 1, 2))
    assert all(str(node.name).startswith(f"blocks.0.attn/{name}") for node in model.graph)


@pytest.mark.parametrize("name", ["Attention", "AttentionCausalBiasMask", "PackedAttentionSoftcap"])
def test_the_scale_on_the_scores_as_in_the_bodies_would_be_found(name: str) -> None:
    model = canonical(name, operands(name, 2), **attributes(name)).model.clone()
    inline_functions(model)
    assert any("/Mul" in found for found in on_the_scores(model))


@pytest.mark.parametrize("name", ["AttentionMask", "PackedAttentionBiasMask", "AttentionGroupedCausalMask"])
@pytest.mark.parametrize("form", AttentionForm)
def test_a_query_that_sees_no_key_gives_zero(name: str, form: AttentionForm) -> None:
    given = operands(name, 3)
    (got,) = open_model(lowered(name, form))(given).values()
    np.testing.assert_array_equal(got[:, 1], np.zeros_like(got[:, 1]))
    assert np.abs(got[:, 0]).max() > 0.1


@pytest.mark.parametrize("form", AttentionForm)
def test_a_constant_mask_is_folded_and_cuts_rows_only_where_it_must(form: AttentionForm) -> None:
    for unseen in (False, True):
        given = operands("AttentionBiasMask", 1, unseen=unseen)
        model = lower(
            canonical("AttentionBiasMask", given, frozenset({"bias", "mask"}), **attributes("AttentionBiasMask")),
            Precision.FP32, attention=form,
        ).model  # fmt: skip
        assert operator_counts(model)["Where"] == int(unseen)
        (got,) = open_model(model)(given).values()
        assert sqnr_db(expected("AttentionBiasMask", given), got) >= MIN_DB


# -- what becomes TensorRT's Attention -------------------------------------------------------------------------------


def attention_node(name: str, **sizes: int) -> ir.Node:
    model = canonical(name, operands(name, 2, **sizes), **attributes(name))
    found = lower(model, Precision.FP32, attention=AttentionForm.OPERATOR).model
    (node,) = [n for n in found.graph if n.op_type == "Attention"]
    return node


def test_causality_alone_is_a_flag_and_joins_a_mask() -> None:
    square = {"query_len": 6, "key_len": 6}
    plain = attention_node("AttentionCausal", **square)
    assert (plain.attributes.get_int("is_causal"), len(plain.inputs)) == (1, 3)
    for name in ("AttentionCausalMask", "AttentionCausalBias"):
        node = attention_node(name, **square)
        assert (node.attributes.get_int("is_causal"), len(node.inputs)) == (0, 4)


def test_causality_over_another_number_of_keys_is_a_mask() -> None:
    """The operator's standard aligns the triangle at the first key, TensorRT has both kinds."""
    node = attention_node("AttentionCausal", query_len=5, key_len=7)
    assert (node.attributes.get_int("is_causal"), len(node.inputs)) == (0, 4)


def test_the_scale_and_the_consent_to_be_taken_apart_are_said() -> None:
    node = attention_node("Attention")
    assert node.attributes.get_float("scale") == pytest.approx(SCALE)
    assert node.attributes.get_int("TRT_decomposable") == 1


def test_a_mask_for_all_queries_alike_is_given_a_row_for_each() -> None:
    """TensorRT broadcasts it over batch and heads alone."""
    given = operands("AttentionMask", 3)
    given["mask"] = given["mask"][:, :, :1]
    model = lower(canonical("AttentionMask", given, **attributes("AttentionMask")), Precision.FP32,
                  attention=AttentionForm.OPERATOR).model  # fmt: skip
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert [*node.inputs[3].shape][1:] == [1, 5, 7]
    (got,) = open_model(model)(given).values()
    assert sqnr_db(expected("AttentionMask", given), got) >= MIN_DB


@pytest.mark.parametrize("head_dim", [12, 8, 264])
def test_a_head_size_without_a_fused_kernel_stays_the_pattern(head_dim: int) -> None:
    counts = operator_counts(lowered("PackedAttention", AttentionForm.OPERATOR, head_dim=head_dim))
    assert (counts["Attention"], counts["Softmax"]) == (0, 1)


def test_values_of_another_size_than_the_keys_stay_the_pattern() -> None:
    given = operands("Attention", 2)
    given["value"] = np.concatenate([given["value"]] * 2, axis=-1)
    model = lower(canonical("Attention", given, scale=SCALE), Precision.FP32, attention=AttentionForm.OPERATOR).model
    assert operator_counts(model)["Attention"] == 0
    (got,) = open_model(model)(given).values()
    assert sqnr_db(expected("Attention", given), got) >= MIN_DB


def test_a_transpose_before_the_site_and_the_lowering_s_own_are_one() -> None:
    """Key and value as a model keeps them, heads first: nothing is left to move."""
    given = operands("Attention", 3)
    exported = canonical("Attention", given, scale=SCALE)
    node = exported.model.graph[0]
    for index, name in ((1, "key"), (2, "value")):
        before = ir.Value(name=f"{name}_by_head", shape=ir.Shape(["batch", 4, 7, 16]), type=ir.TensorType(FLOAT))
        exported.model.graph.inputs[index] = before
        outputs = [ir.Value(name=name, shape=ir.Shape(["batch", 7, 4, 16]), type=ir.TensorType(FLOAT))]
        turned = ir.node("Transpose", [before], {"perm": [0, 2, 1, 3]}, outputs=outputs, name=f"blocks.0/{name}")
        exported.model.graph.insert_before(node, turned)
        node.replace_input_with(index, outputs[0])
    model = lower(exported, Precision.FP32).model
    assert operator_counts(model)["Transpose"] == 3  # query, the key's last two axes, and back
    by_head = {f"{name}_by_head": given[name].transpose(0, 2, 1, 3) for name in ("key", "value")}
    (got,) = open_model(model)(given | by_head).values()
    assert sqnr_db(expected("Attention", given), got) >= MIN_DB


def test_a_negative_scale_stays_the_pattern() -> None:
    """The parser takes its square root."""
    given = operands("Attention", 2)
    model = lower(canonical("Attention", given, scale=-SCALE), Precision.FP32, attention=AttentionForm.OPERATOR).model
    assert operator_counts(model)["Attention"] == 0
    (got,) = open_model(model)(given).values()
    reference = FORMS["Attention"].reference(given["query"], given["key"], given["value"], scale=-SCALE)[0]
    assert sqnr_db(reference, got) >= MIN_DB


def test_the_default_follows_version_and_precision() -> None:
    halves = (Precision.FP16, Precision.BF16, Precision.INT8)
    assert {default_attention((11, 0), p) for p in halves} == {AttentionForm.OPERATOR}
    assert {default_attention((10, 16), p) for p in halves} == {AttentionForm.PATTERN}
    assert default_attention((11, 4), Precision.FP32) is AttentionForm.PATTERN


def test_both_forms_are_to_be_measured_where_there_are_two() -> None:
    assert attention_forms((11, 4), Precision.FP16) == (AttentionForm.OPERATOR, AttentionForm.PATTERN)
    assert attention_forms((10, 15), Precision.BF16) == (AttentionForm.PATTERN, AttentionForm.OPERATOR)
    assert attention_forms((10, 13), Precision.FP16) == (AttentionForm.PATTERN,)
    assert attention_forms((11, 4), Precision.FP32) == (AttentionForm.PATTERN,)


def test_a_version_without_the_operator_refuses_it() -> None:
    model = canonical("Attention", operands("Attention", 2), scale=SCALE)
    with pytest.raises(UsageError, match="has no Attention operator") as caught:
        lower(model, Precision.FP32, attention=AttentionForm.OPERATOR, version=(10, 13))
    assert caught.value.got == "10.13"


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", AttentionForm)
def test_windows_are_one_gather_in_and_one_out(form: AttentionForm) -> None:
    counts = operator_counts(lowered("PackedAttentionIndexedBias", form))
    assert (counts["Gather"], counts["Split"]) == (2, 1)


def test_windows_that_share_a_bias_are_samples_and_others_are_heads() -> None:
    name = "PackedAttentionIndexedBias"
    given = operands(name, 3)
    for bias_index, shape in (([1, 1, 1, 1], (1, 4, 6, 6)), ([0, 1, 1, 0], (1, 4 * WINDOWS, 6, 6))):
        given["bias_index"] = np.array(bias_index)
        model = lower(canonical(name, given, constants_of_windows(name), **attributes(name)), Precision.FP32).model
        (added,) = [n for n in model.graph if n.op_type == "Add"]
        assert tuple(added.inputs[1].const_value.shape) == shape
        (got,) = open_model(model)(given).values()
        assert sqnr_db(expected(name, given), got) >= MIN_DB


def test_windows_of_tokens_in_order_move_nothing() -> None:
    name = "PackedAttentionIndexed"
    given = operands(name, 3)
    given["index"] = np.arange(TOKENS).reshape(WINDOWS, -1)
    model = lower(canonical(name, given, constants_of_windows(name), **attributes(name)), Precision.FP32).model
    assert operator_counts(model)["Gather"] == 0
    (got,) = open_model(model)(given).values()
    assert sqnr_db(expected(name, given), got) >= MIN_DB


def test_windows_whose_index_is_computed_run_from_their_body() -> None:
    name = "PackedAttentionIndexedBias"
    given = operands(name, 3)
    model = lower(canonical(name, given, **attributes(name)), Precision.FP32).model
    (got,) = open_model(model)(given).values()
    assert sqnr_db(expected(name, given), got) >= MIN_DB


# -- sequences of any length -----------------------------------------------------------------------------------------

LENGTHS = ["Attention", "AttentionGroupedCausal", "AttentionGroupedBiasMask", "PackedAttentionCausalMask",
           "PackedAttentionSoftcapCausal", "AttentionCausal"]  # fmt: skip


@pytest.mark.parametrize("form", AttentionForm)
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_may_be_open_too(name: str, form: AttentionForm) -> None:
    given = operands(name, 2)
    model = lower(canonical(name, given, dynamic="length", **attributes(name)), Precision.FP32, attention=form).model
    run = open_model(model)
    for query_len, key_len in ((5, 7), (9, 9), (1, 3)):
        given = operands(name, 3, query_len=query_len, key_len=key_len, unseen=query_len > 1)
        (got,) = run(given).values()
        assert sqnr_db(expected(name, given), got) >= MIN_DB
