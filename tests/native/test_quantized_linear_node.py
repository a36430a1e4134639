"""QuantizedLinear as a node of a model: every form, threads, weights that are not what they have to be, wrong shapes,
and what the graph knows of the output's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from linear_cases import EPSILON
from quantized_linear_cases import QuantizedLinear

from attn_deploy.ops import FORMS

MakeModel = Callable[..., bytes]
OpenModel = Callable[..., onnxruntime.InferenceSession]
RunForm = Callable[..., list[np.ndarray]]
Feeds = dict[str, np.ndarray]

QUANTIZED = [name for name, form in FORMS.items() if form.operator == "QuantizedLinear"]


def attributes_of(form: str) -> dict[str, float]:
    return {"epsilon": EPSILON} if "epsilon" in FORMS[form].attributes else {}


def parts_of(form: str) -> dict[str, object]:
    plain = form.removeprefix("Quantized")
    activation = plain.removeprefix("Norm").removeprefix("Linear").removesuffix("Residual")
    return {"activation": activation, "norm": plain.startswith("Norm"), "residual": plain.endswith("Residual")}


def inputs_of(form: str, rows: int, inputs: int, outputs: int) -> tuple[QuantizedLinear, Feeds, Feeds]:
    """The call, what is fed to it and the constants."""
    call = QuantizedLinear(rows, inputs, outputs, **parts_of(form))  # type: ignore[arg-type]
    constants: Feeds = dict(zip((i.name for i in FORMS[form].inputs), call.arrays(), strict=True))
    fed: Feeds = {name: constants.pop(name) for name in ("x", "residual") if name in constants}
    return call, fed, constants


def check(call: QuantizedLinear, output: np.ndarray, fed: Feeds, constants: Feeds) -> None:
    arrays = {**fed, **constants}
    call.check(output.reshape(-1), [arrays[i.name] for i in FORMS[call.form].inputs])


@pytest.mark.parametrize("form", QUANTIZED)
def test_every_form_equals_its_reference_and_its_body(
    make_model: MakeModel, open_model: OpenModel, library: Path, form: str
) -> None:
    call, fed, constants = inputs_of(form, 30, 24, 40)
    model = make_model(form, attributes=attributes_of(form), constants=constants)
    (output,) = open_model(model, library=library).run(None, fed)
    check(call, output, fed, constants)
    (body,) = open_model(model, library=None).run(None, fed)
    check(call, body, fed, constants)


@pytest.mark.parametrize("lead", [(1,), (0,), (3, 0, 2), (2, 1, 1, 4)])
def test_leading_dims_are_rows(run_form: RunForm, lead: tuple[int, ...]) -> None:
    form = "QuantizedNormLinearGeluResidual"
    call, fed, constants = inputs_of(form, int(np.prod(lead)), 9, 33)
    shaped = {name: array.reshape(*lead, array.shape[1]) for name, array in fed.items()}
    (output,) = run_form(form, shaped, attributes=attributes_of(form), constants=constants)
    assert output.shape == (*lead, 33)
    if output.size:
        check(call, output, fed, constants)


@pytest.mark.parametrize(
    ("form", "rows", "inputs", "outputs"),
    [
        pytest.param("QuantizedNormLinearGelu", 131, 96, 130, id="rows"),
        pytest.param("QuantizedLinearResidual", 3, 1500, 2030, id="columns"),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(
    run_form: RunForm, form: str, rows: int, inputs: int, outputs: int
) -> None:
    call, fed, constants = inputs_of(form, rows, inputs, outputs)
    given = {"attributes": attributes_of(form), "constants": constants}
    (one,) = run_form(form, fed, threads=1, **given)
    check(call, one, fed, constants)
    for threads in (2, 3, 8):
        for _ in range(3):
            (output,) = run_form(form, fed, threads=threads, **given)
            np.testing.assert_array_equal(output, one)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias", "norm_scale", "norm_bias"])
def test_weights_that_are_not_constants_are_refused_at_load(
    make_model: MakeModel, open_model: OpenModel, library: Path, name: str
) -> None:
    form = "QuantizedNormLinearResidual"
    _, _, constants = inputs_of(form, 2, 3, 4)
    del constants[name]
    shapes = {name: [3, 4]} if name == "weight" else {}
    model = make_model(form, node_name="layer3/mlp", attributes=attributes_of(form), constants=constants, shapes=shapes)
    with pytest.raises(Exception, match=f"{form} node 'layer3/mlp': {name} is not a constant; expected an initializer"):
        open_model(model, library=library)


def scales(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        pytest.param("weight", np.ones(12, np.uint8), r"weight .* \[12\]; expected uint8 .* \[-1,-1\]", id="rank"),
        pytest.param("weight", np.ones((3, 0), np.uint8), r"weight .* shape \[3,0\]", id="empty"),
        pytest.param("weight_scale", scales(1, 1, 1), r"weight_scale .* \[3\]; expected .* \[4\]", id="scales"),
        pytest.param("weight_scale", scales(1, 0, 1, 1), r"weight_scale is 0.0* at 1; .* above 0", id="zero"),
        pytest.param("weight_scale", scales(1, 1, 1, -2), r"weight_scale is -2.0* at 3; expected", id="negative"),
        pytest.param("weight_scale", scales(1, 1, 1, np.inf), r"weight_scale is inf at 3; expected", id="infinite"),
        pytest.param("weight_scale", scales(np.nan, 1, 1, 1), r"weight_scale is -?nan at 0; expected", id="nan"),
        pytest.param("bias", scales(1, 2, 3), r"bias .* shape \[3\]; expected float32 .* \[4\]", id="bias"),
        pytest.param("norm_scale", scales(1, 2, 3, 4), r"norm_scale .* \[4\]; expected .* \[3\]", id="norm-scale"),
        pytest.param("norm_scale", scales(1, np.nan, 3), r"norm_scale is nan at 1; expected finite", id="norm-nan"),
        pytest.param("norm_bias", scales(-np.inf, 2, 3), r"norm_bias is -inf at 0; expected finite", id="norm-inf"),
    ],
)  # fmt: skip
def test_weights_of_wrong_shape_or_value_are_refused_at_load(
    make_model: MakeModel, open_model: OpenModel, library: Path, name: str, value: np.ndarray, said: str
) -> None:
    form = "QuantizedNormLinear"
    _, _, constants = inputs_of(form, 2, 3, 4)
    constants[name] = value
    model = make_model(form, node_name="fc", attributes=attributes_of(form), constants=constants, with_body=False)
    with pytest.raises(Exception, match=f"{form} node 'fc': {said}"):
        open_model(model, library=library)


def test_more_inputs_than_32_bits_can_add_up_are_refused(
    make_model: MakeModel, open_model: OpenModel, library: Path
) -> None:
    weight = np.full((65537, 1), 255, np.uint8)
    constants = {"weight": weight, "weight_scale": scales(1), "bias": scales(0)}
    model = make_model("QuantizedLinear", node_name="fc", constants=constants, with_body=False)
    with pytest.raises(Exception, match="node 'fc': weight has 65537 inputs; expected at most 65536"):
        open_model(model, library=library)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        pytest.param({"x": (2, 4)}, r"x has shape \[2,4\]; expected \[...,3\]", id="x"),
        pytest.param({"x": ()}, r"x has shape \[\]; expected \[...,3\]", id="scalar"),
        pytest.param({"residual": (1, 4)}, r"residual .* \[1,4\], .* expected .* shape \[2,4\]", id="residual"),
    ],
)
def test_wrong_shapes_raise_with_the_node_name_and_leave_the_session_well(
    make_model: MakeModel, open_model: OpenModel, library: Path, shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    form = "QuantizedLinearResidual"
    call, fed, constants = inputs_of(form, 2, 3, 4)
    session = open_model(make_model(form, node_name="fc", constants=constants, with_body=False), library=library)
    wrong = {**fed, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()}}
    with pytest.raises(Exception, match=f"{form} node 'fc': {said}"):
        session.run(None, wrong)
    check(call, session.run(None, fed)[0], fed, constants)


def test_the_graph_knows_the_output_shape(make_model: MakeModel, open_model: OpenModel, library: Path) -> None:
    form = "QuantizedLinearGelu"
    _, _, constants = inputs_of(form, 2, 3, 4)
    shapes = {"x": ["batch", "tokens", 3]}
    model = make_model(form, constants=constants, shapes=shapes, with_body=False)
    assert open_model(model, library=library).get_outputs()[0].shape == ["batch", "tokens", 4]
