"""Where a site's weights are found in the portable model, checked against the operators' references."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from attn_deploy import runtimes
from attn_deploy.export.functions import attach_functions, inline_functions
from attn_deploy.export.observe import Observed, observe, watch_sites, with_outputs
from attn_deploy.ops import FORMS
from attn_deploy.ops.form import softmax_float64
from attn_deploy.target import Target

RNG = np.random.default_rng(0)
INDEX = np.array([[0, 1, 2], [3, 4, -1]])


def observed(text: str, feeds: dict[str, np.ndarray], constants: dict[str, np.ndarray] | None = None) -> Observed:
    """Of the model's last node, called `a/Site`."""
    canonical = ir.serde.deserialize_model(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20, "attn_deploy" : 1]> {text}')
    )
    for name, array in (constants or {}).items():
        (value,) = (i for i in canonical.graph.inputs if i.name == name)
        canonical.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        canonical.graph.register_initializer(value)
    node = list(canonical.graph)[-1]
    node.name = "a/Site"
    attach_functions(canonical)
    portable = canonical.clone()
    inline_functions(portable)
    watches = watch_sites(canonical, portable, {"a/Site"})
    session = runtimes.open_session(Target.ONNXRUNTIME_CPU, with_outputs(portable, [w.value for w in watches]))
    (found,) = observe(watches, session.run(feeds))
    return found


def test_the_weights_of_an_attention_are_its_softmax_and_a_masked_row_is_0() -> None:
    qkv = RNG.standard_normal((1, 4, 3, 2, 5)).astype(np.float32)
    mask = np.ones((1, 1, 4, 4), bool)
    mask[0, 0, 2] = False
    found = observed(
        """net (float[b, 4, 3, 2, 5] qkv, bool[1, 1, 4, 4] mask) => (float[b, 4, 10] y)
        { y = attn_deploy.PackedAttentionMask <scale: float = 0.5> (qkv, mask) }""",
        {"qkv": qkv, "mask": mask},
    )
    query, key, _ = qkv[0].transpose(1, 2, 0, 3)
    expected = softmax_float64(0.5 * query @ key.swapaxes(-1, -2), np.broadcast_to(mask[0], (2, 4, 4)))
    np.testing.assert_allclose(found.weights[0], expected, rtol=1e-5)
    assert not found.weights[0, :, 2].any()
    assert (found.operator, found.index) == ("PackedAttention", None)


def test_an_index_map_comes_with_the_weights_of_its_windows() -> None:
    padded = next(f.name for f in FORMS.values() if [i.name for i in f.inputs] == ["qkv", "index", "fill"])
    found = observed(
        f"""net (float[b, 5, 3, 2, 4] qkv, int64[2, 3] index, float[3, 2, 4] fill) => (float[b, 5, 8] y)
        {{ y = attn_deploy.{padded} <scale: float = 0.5, tokens: int = 5> (qkv, index, fill) }}""",
        {
            "qkv": RNG.standard_normal((1, 5, 3, 2, 4)).astype(np.float32),
            "fill": np.zeros((3, 2, 4), np.float32),
        },
        {"index": INDEX},
    )
    assert found.weights.shape == (1, 2, 2, 3, 3)
    np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-5)
    assert found.index is not None
    np.testing.assert_array_equal(found.index, INDEX)


@pytest.mark.parametrize("form", ["Gate", "GateRelu"])
def test_a_gate_is_taken_before_it_multiplies(form: str) -> None:
    gate = RNG.random((1, 3, 1, 1)).astype(np.float32)
    found = observed(
        f"""net (float[b, 3, 2, 2] x, float[b, 3, 1, 1] g) => (float[b, 3, 2, 2] y)
        {{ y = attn_deploy.{form} (x, g) }}""",
        {"x": np.ones((1, 3, 2, 2), np.float32), "g": gate},
    )
    np.testing.assert_array_equal(found.weights, gate)
    assert found.operator == "Gate"


def test_a_hard_choice_is_1_for_the_tokens_chosen() -> None:
    found = observed(
        """net (float[b, 5] s, float[b, 5, 3] v) => (float[b, 2, 3] y)
        { y = attn_deploy.HardAttention <k: int = 2> (s, v) }""",
        {"s": np.array([[0.1, 0.9, 0.3, 0.9, 0.2]], np.float32), "v": np.ones((1, 5, 3), np.float32)},
    )
    assert found.weights.tolist() == [[0, 1, 0, 1, 0]]


def test_tokens_behind_a_choice_are_known_to_lie_on_no_grid() -> None:
    chain = """net (float[b, 5] s, float[b, 5, 3] v, float[b, 1, 2] t) => (float[b, 1, 3] y) {{
        {choice}
        y = attn_deploy.ContextPool (t, {values}) }}"""
    feeds = {"s": RNG.random((1, 5), np.float32), "v": RNG.random((1, 5, 3), np.float32)}
    feeds["t"] = RNG.random((1, 1, 2), np.float32)
    choice = "c = attn_deploy.HardAttention <k: int = 2> (s, v)"
    assert observed(chain.format(choice=choice, values="c"), feeds).chosen
    shortened = chain.replace("float[b, 5, 3] v", "float[b, 2, 3] v").format(choice="", values="v")
    assert not observed(shortened, {**feeds, "v": feeds["v"][:, :2]}).chosen
