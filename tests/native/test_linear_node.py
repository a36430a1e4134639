"""Linear and FeedForward as nodes of a model: every form, threads, weights that are not constants, wrong shapes, and
what the graph knows of the output's shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from attn_deploy.ops import BLOCK_FORMS

MakeModel = Callable[..., bytes]
OpenModel = Callable[..., onnxruntime.InferenceSession]
RunForm = Callable[..., list[np.ndarray]]
Feeds = dict[str, np.ndarray]

LINEAR = [name for name, form in BLOCK_FORMS.items() if form.operator == "Linear"]
FEED_FORWARD = [name for name, form in BLOCK_FORMS.items() if form.operator == "FeedForward"]
EPSILON = 1e-3


def attributes_of(form: str) -> dict[str, float]:
    return {"epsilon": EPSILON} if "epsilon" in BLOCK_FORMS[form].attributes else {}


def inputs_of(form: str, lead: tuple[int, ...], inputs: int, outputs: int) -> tuple[Feeds, Feeds]:
    """What is fed, and the constants. For FeedForward `outputs` is the hidden layer's width."""
    sizes = {
        "x": (*lead, inputs), "norm_scale": (inputs,), "norm_bias": (inputs,), "residual": (*lead, outputs),
        "weight": (inputs, outputs), "bias": (outputs,), "weight1": (inputs, outputs), "bias1": (outputs,),
        "weight2": (outputs, inputs), "bias2": (inputs,),
    }  # fmt: skip
    rng = np.random.default_rng(len(form) + inputs)
    arrays = {i.name: rng.standard_normal(sizes[i.name]).astype(np.float32) for i in BLOCK_FORMS[form].inputs}
    for name in arrays:
        if name.startswith("weight"):
            arrays[name] /= np.float32(np.sqrt(sizes[name][0]))
    fed: Feeds = {name: arrays.pop(name) for name in ("x", "residual") if name in arrays}
    return fed, arrays


def reference(form: str, fed: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> np.ndarray:
    arrays = {**fed, **constants}
    ordered = [arrays[i.name] for i in BLOCK_FORMS[form].inputs]
    return BLOCK_FORMS[form].reference(*ordered, **attributes_of(form))[0]


@pytest.mark.parametrize("form", [*LINEAR, *FEED_FORWARD])
def test_every_form_equals_its_reference_and_its_body(
    make_model: MakeModel, open_model: OpenModel, library: Path, form: str
) -> None:
    fed, constants = inputs_of(form, (2, 3, 5), 24, 40)
    model = make_model(form, attributes=attributes_of(form), constants=constants)
    (output,) = open_model(model, library=library).run(None, fed)
    (body,) = open_model(model, library=None).run(None, fed)
    np.testing.assert_allclose(output, reference(form, fed, constants), rtol=0, atol=2e-5)
    np.testing.assert_allclose(output, body, rtol=0, atol=2e-5)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 0, 2), (2, 1, 1, 4)])
@pytest.mark.parametrize("form", ["NormLinearGeluResidual", "FeedForwardSilu"])
def test_leading_dims_are_rows(run_form: RunForm, form: str, lead: tuple[int, ...]) -> None:
    fed, constants = inputs_of(form, lead, 9, 33)
    (output,) = run_form(form, fed, attributes=attributes_of(form), constants=constants)
    expected = reference(form, fed, constants)
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("form", "rows", "inputs", "outputs"),
    [
        pytest.param("NormLinearGelu", 131, 96, 130, id="rows"),
        pytest.param("LinearResidual", 3, 1500, 1030, id="columns"),
        pytest.param("FeedForwardGelu", 131, 96, 400, id="feed-forward"),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(
    run_form: RunForm, form: str, rows: int, inputs: int, outputs: int
) -> None:
    fed, constants = inputs_of(form, (rows,), inputs, outputs)
    given = {"attributes": attributes_of(form), "constants": constants}
    (one,) = run_form(form, fed, threads=1, **given)
    np.testing.assert_allclose(one, reference(form, fed, constants), rtol=0, atol=5e-5)
    for threads in (2, 3, 8):
        for _ in range(3):
            (output,) = run_form(form, fed, threads=threads, **given)
            np.testing.assert_array_equal(output, one)


@pytest.mark.parametrize(
    ("form", "name"),
    [(form, i.name) for form in ("NormLinearResidual", "FeedForwardGelu") for i in BLOCK_FORMS[form].inputs
     if i.name not in ("x", "residual")],
)  # fmt: skip
def test_weights_that_are_not_constants_are_refused_at_load(
    make_model: MakeModel, open_model: OpenModel, library: Path, form: str, name: str
) -> None:
    _, constants = inputs_of(form, (2,), 3, 4)
    del constants[name]
    model = make_model(form, node_name="layer3/mlp", attributes=attributes_of(form), constants=constants)
    with pytest.raises(Exception, match=f"{form} node 'layer3/mlp': {name} is not a constant; expected an initializer"):
        open_model(model, library=library)


@pytest.mark.parametrize(
    ("form", "name", "shape", "said"),
    [
        pytest.param("Linear", "weight", (12,), r"weight .* shape \[12\]; expected .* \[-1,-1\]", id="weight-rank"),
        pytest.param("Linear", "weight", (3, 0), r"weight .* shape \[3,0\]", id="weight-empty"),
        pytest.param("Linear", "bias", (3,), r"bias .* shape \[3\]; expected .* \[4\]", id="bias"),
        pytest.param("Linear", "bias", (1, 4), r"bias .* shape \[1,4\]; expected .* \[4\]", id="bias-rank"),
        pytest.param("NormLinear", "norm_scale", (4,), r"norm_scale .* \[4\]; expected .* \[3\]", id="norm-scale"),
        pytest.param("NormLinear", "norm_bias", (1,), r"norm_bias .* \[1\]; expected .* \[3\]", id="norm-bias"),
        pytest.param(
            "FeedForwardRelu", "weight2", (3, 4), r"bias2 .* shape \[3\]; expected .* \[4\]", id="weight2-and-bias2"
        ),
        pytest.param(
            "FeedForwardRelu", "weight2", (5, 3), r"weight2 has shape \[5,3\]; expected \[4,3\]", id="weight2"
        ),
    ],
)
def test_weights_of_wrong_shape_are_refused_at_load(
    make_model: MakeModel,
    open_model: OpenModel,
    library: Path,
    form: str,
    name: str,
    shape: tuple[int, ...],
    said: str,
) -> None:
    _, constants = inputs_of(form, (2,), 3, 4)
    constants[name] = np.ones(shape, np.float32)
    model = make_model(form, node_name="fc", attributes=attributes_of(form), constants=constants)
    with pytest.raises(Exception, match=f"{form} node 'fc': {said}"):
        open_model(model, library=library)


@pytest.mark.parametrize(
    ("form", "shapes", "said"),
    [
        pytest.param("LinearResidual", {"x": (2, 4)}, r"x has shape \[2,4\]; expected \[...,3\]", id="x"),
        pytest.param("FeedForwardGelu", {"x": ()}, r"x has shape \[\]; expected \[...,3\]", id="scalar"),
        pytest.param("FeedForwardGelu", {"x": (1,) * 8 + (3,)}, r"x has rank 9; expected at most 8", id="rank-9"),
        pytest.param(
            "LinearResidual", {"residual": (1, 4)}, r"residual .* \[1,4\], .* expected .* shape \[2,4\]", id="residual",
        ),
    ],
)  # fmt: skip
def test_wrong_shapes_raise_with_the_node_name_and_leave_the_session_well(
    make_model: MakeModel,
    open_model: OpenModel,
    library: Path,
    form: str,
    shapes: dict[str, tuple[int, ...]],
    said: str,
) -> None:
    fed, constants = inputs_of(form, (2,), 3, 4)
    model = make_model(form, node_name="fc", attributes=attributes_of(form), constants=constants)
    session = open_model(model, library=library)
    wrong = {**fed, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()}}
    with pytest.raises(Exception, match=f"{form} node 'fc': {said}"):
        session.run(None, wrong)
    np.testing.assert_allclose(session.run(None, fed)[0], reference(form, fed, constants), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "x", "expected"),
    [
        pytest.param("LinearGelu", ["batch", "tokens", 3], ["batch", "tokens", 4], id="symbolic"),
        pytest.param("LinearGelu", [2, 7, 3], [2, 7, 4], id="fixed"),
        pytest.param("FeedForwardGelu", ["batch", "tokens", 3], ["batch", "tokens", 3], id="feed-forward"),
    ],
)
def test_the_graph_knows_the_output_shape(
    make_model: MakeModel,
    open_model: OpenModel,
    library: Path,
    form: str,
    x: list[str | int | None],
    expected: list[str | int],
) -> None:
    _, constants = inputs_of(form, (2,), 3, 4)
    model = make_model(form, attributes=attributes_of(form), constants=constants, shapes={"x": x}, with_body=False)
    assert open_model(model, library=library).get_outputs()[0].shape == expected
