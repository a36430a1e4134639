"""Function bodies on a model: attached, checked, and put in place of the operators."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.functions import attach_functions, check_functions, inline_functions, register_schemas
from attn_deploy.ops import DOMAIN, FORMS, VERSION
from attn_deploy.readback import site_runs
from attn_deploy.runtimes import read_back
from attn_deploy.target import Target

TWO_SITES = """<ir_version: 10, opset_import: ["" : 20, "attn_deploy" : 1]>
two_sites (float[batch, 6, 2, 4] x, float[batch, 1, 1, 6] gate, bool[batch, 1, 6, 6] mask) => (float[batch, 6, 2, 4] y)
{
    [stem__Relu] features = Relu (x)
    [blk_0_attn__AttentionMask] attended = attn_deploy.AttentionMask <scale: float = 0.5> (x, features, x, mask)
    [blk_1_attn__AttentionMask] again = attn_deploy.AttentionMask <scale: float = 0.25> (attended, features, x, mask)
    [blk_1_se__Transpose] turned = Transpose <perm: ints = [0, 2, 3, 1]> (again)
    [blk_1_se__GateSilu] gated = attn_deploy.GateSilu (turned, gate)
    [head__Transpose] y = Transpose <perm: ints = [0, 3, 1, 2]> (gated)
}"""


def parse(text: str) -> ir.Model:
    """ONNX text cannot hold a slash in a name: `module__Operator` stands for `module/Operator`."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        node.name = str(node.name).replace("__", "/")
    return model


def with_bodies(text: str = TWO_SITES) -> ir.Model:
    model = parse(text)
    attach_functions(model)
    return model


def inlined(text: str = TWO_SITES, *keep: str) -> ir.Model:
    model = with_bodies(text)
    inline_functions(model, keep=frozenset(keep))
    return model


def feeds(batch: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((batch, 6, 2, 4)).astype(np.float32),
        "gate": rng.standard_normal((batch, 1, 1, 6)).astype(np.float32),
        "mask": rng.random((batch, 1, 6, 6)) < 0.5,
    }


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def operators(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.domain == DOMAIN]


def reference(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The model of TWO_SITES from the operators' references."""
    x, mask = inputs["x"], inputs["mask"]
    features = np.maximum(x, 0)
    (attended,) = FORMS["AttentionMask"].reference(x, features, x, mask, scale=0.5)
    (again,) = FORMS["AttentionMask"].reference(attended, features, x, mask, scale=0.25)
    (gated,) = FORMS["GateSilu"].reference(again.transpose(0, 2, 3, 1), inputs["gate"])
    return gated.transpose(0, 3, 1, 2)


# -- attaching -------------------------------------------------------------------------------------------------------


def test_every_used_form_gets_its_body_once_and_no_other() -> None:
    model = with_bodies()
    assert {identifier[:2] for identifier in model.functions} == {(DOMAIN, "AttentionMask"), (DOMAIN, "GateSilu")}


@pytest.mark.parametrize("opset", [20, 22, 25])
def test_bodies_are_stamped_with_the_opset_of_the_model(opset: int) -> None:
    model = with_bodies(TWO_SITES.replace('"" : 20', f'"" : {opset}'))
    assert {f.opset_imports[""] for f in model.functions.values()} == {opset}


def test_a_model_without_our_operators_stays_as_it_is() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
    assert not with_bodies(text).functions


def test_the_onnx_checker_takes_the_model_with_bodies_and_the_inlined_one() -> None:
    register_schemas()
    register_schemas()  # safe to call again
    for model in (with_bodies(), inlined()):
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_every_form_is_known_to_onnx_after_registering() -> None:
    register_schemas()
    for name, form in FORMS.items():
        schema = onnx.defs.get_schema(name, VERSION, DOMAIN)
        assert [i.name for i in schema.inputs] == [i.name for i in form.inputs]
        assert set(schema.attributes) == set(form.attributes)


# -- refusing --------------------------------------------------------------------------------------------------------


def test_an_operator_without_a_body_is_refused_by_name() -> None:
    model = with_bodies()
    del model.functions[(DOMAIN, "GateSilu", "")]
    with pytest.raises(AttnDeployError, match="no function body") as caught:
        check_functions(model)
    assert (caught.value.where, caught.value.got) == ("blk_1_se/GateSilu", "GateSilu")


def test_an_operator_without_a_body_is_not_inlined() -> None:
    with pytest.raises(AttnDeployError, match="no function body"):
        inline_functions(parse(TWO_SITES))


def test_a_missing_attribute_is_refused_with_what_is_expected() -> None:
    with pytest.raises(AttnDeployError, match="does not fit its schema") as caught:
        with_bodies(TWO_SITES.replace("<scale: float = 0.25>", ""))
    assert caught.value.where == "blk_1_attn/AttentionMask"
    assert caught.value.got == "4 inputs, attributes []"
    assert caught.value.expected == "4 inputs, attributes ['scale']"


def test_an_attribute_too_many_is_refused() -> None:
    with pytest.raises(AttnDeployError, match="does not fit its schema"):
        with_bodies(TWO_SITES.replace("<scale: float = 0.25>", "<scale: float = 0.25, causal: int = 1>"))


def test_a_missing_input_is_refused() -> None:
    with pytest.raises(AttnDeployError, match="does not fit its schema") as caught:
        with_bodies(TWO_SITES.replace("(turned, gate)", "(turned)"))
    assert caught.value.got == "1 inputs, attributes []"


def test_an_operator_that_is_no_form_is_refused_with_the_nearest() -> None:
    with pytest.raises(AttnDeployError, match="is no operator of ours") as caught:
        with_bodies(TWO_SITES.replace("attn_deploy.GateSilu", "attn_deploy.GateSiLU"))
    assert caught.value.where == "blk_1_se/GateSilu"
    assert "GateSilu" in str(caught.value.expected)


# -- inlining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_operators_with_bodies_and_inlined_ones_give_the_reference(batch: int) -> None:
    inputs = feeds(batch)
    expected = reference(inputs)
    for model in (with_bodies(), inlined()):
        (got,) = run(model, inputs)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_inlining_leaves_standard_onnx_alone() -> None:
    model = inlined()
    assert operators(model) == []
    assert not model.functions
    assert DOMAIN not in model.opset_imports
    assert [o.name for o in model.graph.outputs] == ["y"]


def test_names_of_what_is_inlined_start_with_the_operator_s_name() -> None:
    before = {n.name for n in parse(TWO_SITES).graph}
    sites = ("blk_0_attn/AttentionMask", "blk_1_attn/AttentionMask", "blk_1_se/GateSilu")
    made = [str(n.name) for n in inlined().graph if n.name not in before]
    assert made
    assert all(name.startswith(tuple(site + "/" for site in sites)) for name in made)
    for site in sites:
        assert sum(name.startswith(site + "/") for name in made) == len(
            FORMS[site.rpartition("/")[2]].body.splitlines()
        )


def test_names_of_nodes_and_values_are_distinct() -> None:
    model = inlined()
    nodes = [n.name for n in model.graph]
    values = [o.name for n in model.graph for o in n.outputs]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)


def test_each_operator_keeps_its_own_attributes() -> None:
    scales = {
        str(n.name).partition("/")[0]: n.attributes["value_float"].value
        for n in inlined().graph
        if n.op_type == "Constant" and "value_float" in n.attributes and n.outputs[0].name.endswith("scale_value")
    }
    assert scales == {"blk_0_attn": 0.5, "blk_1_attn": 0.25}


def test_a_form_that_is_kept_stays_with_its_body_and_the_others_go() -> None:
    model = inlined(TWO_SITES, "GateSilu")
    assert operators(model) == ["GateSilu"]
    assert {identifier[1] for identifier in model.functions} == {"GateSilu"}
    assert model.opset_imports[DOMAIN] == VERSION
    check_functions(model)
    np.testing.assert_allclose(run(model, feeds())[0], reference(feeds()), rtol=0, atol=1e-5)


def test_keeping_a_form_that_the_model_lacks_changes_nothing() -> None:
    model = inlined(TWO_SITES, "ChannelPoolMean")
    assert operators(model) == []
    assert not model.functions


def test_inlining_a_clone_leaves_the_canonical_model_as_it_was() -> None:
    model = with_bodies()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    inline_functions(model.clone())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("canonical", [True, False], ids=["with bodies", "inlined"])
def test_a_model_whose_output_is_the_operator_s_keeps_its_output(canonical: bool) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "attn_deploy" : 1]>
    last (float[n, 3, 2, 2] x) => (float[n, 3, 1, 1] mean, float[n, 3, 1, 1] maximum)
    { [pool__ChannelPoolMeanMax] mean, maximum = attn_deploy.ChannelPoolMeanMax (x) }"""
    model = with_bodies(text) if canonical else inlined(text)
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    mean, maximum = run(model, {"x": x})
    assert [o.name for o in model.graph.outputs] == ["mean", "maximum"]
    np.testing.assert_allclose(mean, x.mean((2, 3), keepdims=True))
    np.testing.assert_array_equal(maximum, x.max((2, 3), keepdims=True))


def test_every_node_that_onnx_runtime_makes_of_a_site_is_told_to_be_its_own() -> None:
    """Its optimizer fuses and renames; what is left of the model stands outside the sites."""
    sites = ("blk_0_attn/AttentionMask", "blk_1_attn/AttentionMask", "blk_1_se/GateSilu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(inlined(), path)
        nodes = read_back(Target.ONNXRUNTIME_CPU, path, feeds())
    runs = site_runs([(site, site) for site in sites], nodes)
    assert all(r.nodes for r in runs)
    assert "FusedMatMul" in runs[0].nodes  # the optimizer was at work
    of_no_site = [n for n in nodes if not n.name.startswith(sites)]
    assert {n.op_type for n in of_no_site} <= {"Relu", "Transpose"}
    assert sum(len(r.nodes) for r in runs) + len(of_no_site) == len(nodes)
