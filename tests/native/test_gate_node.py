"""Gate as a node of a model: which code runs it, what it says about bad inputs, what the graph knows of its shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from attn_deploy.ops import FORMS

MakeModel = Callable[..., bytes]
OpenModel = Callable[..., onnxruntime.InferenceSession]

GATE_FORMS = [name for name, form in FORMS.items() if form.operator == "Gate"]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def operators_run(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> list[str]:
    """The operator names of the nodes that ran, in order, out of the session's own profile."""
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [e["args"]["op_name"] for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("form", GATE_FORMS)
def test_the_kernel_takes_the_node_and_agrees_with_the_body(
    make_gate_model: MakeModel, open_model: OpenModel, library: Path, tmp_path: Path, form: str
) -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 5, 7, 7), "gate": (2, 5, 1, 1), "residual": (2, 5, 7, 7)}
    feeds = {i.name: rng.standard_normal(shapes[i.name], dtype=np.float32) for i in FORMS[form].inputs}
    model = make_gate_model(form)
    native = open_model(model, library=library, profile_to=tmp_path / "native")
    inlined = open_model(model, library=None, profile_to=tmp_path / "inlined")

    np.testing.assert_allclose(native.run(None, feeds)[0], inlined.run(None, feeds)[0], rtol=1e-5, atol=1e-6)
    assert set(operators_run(native, feeds)) == {form}
    body = operators_run(inlined, feeds)
    assert body[0] == "Mul"
    assert not set(body) & set(GATE_FORMS)


def test_without_library_and_body_the_model_does_not_load(make_gate_model: MakeModel, open_model: OpenModel) -> None:
    with pytest.raises(Exception, match="attn_deploy:Gate"):
        open_model(make_gate_model("Gate", with_body=False), library=None)


@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        pytest.param([(2, 3, 4, 4), (3, 4, 4), (2, 3, 4, 4)], ["gate", "[3,4,4]", "[2,3,4,4]"], id="gate-rank-below"),
        pytest.param([(2, 3), (2, 3, 1), (2, 3)], ["gate", "[2,3,1]", "[2,3]"], id="gate-rank-above"),
        pytest.param([(2, 3, 4, 4), (2, 2, 1, 1), (2, 3, 4, 4)], ["gate", "[2,2,1,1]", "[2,3,4,4]"], id="gate-dim"),
        pytest.param([(1, 3, 4, 4), (2, 3, 1, 1), (1, 3, 4, 4)], ["gate", "[2,3,1,1]", "[1,3,4,4]"], id="gate-larger"),
        pytest.param([(1, 3), (0, 3), (1, 3)], ["gate", "[0,3]", "[1,3]"], id="gate-empty"),
        pytest.param([(2, 3), (2, 1), (1, 3)], ["residual", "[1,3]", "[2,3]"], id="residual-broadcast"),
        pytest.param([(2, 3), (2, 1), (2, 3, 1)], ["residual", "[2,3,1]", "[2,3]"], id="residual-rank"),
        pytest.param([(), (), ()], ["shape []", "rank 1 to 8"], id="scalar"),
        pytest.param([(2,) * 9, (2,) * 9, (2,) * 9], ["rank 9", "at most 8"], id="rank-9"),
    ],
)
def test_wrong_shapes_raise_with_the_node_name_and_the_shapes(
    make_gate_model: MakeModel, open_model: OpenModel, library: Path, shapes: list[tuple[int, ...]], parts: list[str]
) -> None:
    session = open_model(make_gate_model("GateResidual", node_name="layer3/se"), library=library)
    feeds = dict(zip(("x", "gate", "residual"), (ones(*shape) for shape in shapes), strict=True))
    with pytest.raises(Exception, match="GateResidual node 'layer3/se'") as caught:
        session.run(None, feeds)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    # The session is none the worse for it.
    good = {"x": ones(2, 3), "gate": ones(2, 1), "residual": ones(2, 3)}
    np.testing.assert_array_equal(session.run(None, good)[0], 2 * ones(2, 3))


def test_a_long_node_name_is_said_whole(make_gate_model: MakeModel, open_model: OpenModel, library: Path) -> None:
    name = "block/" * 100
    session = open_model(make_gate_model("Gate", node_name=name), library=library)
    with pytest.raises(Exception, match=re.escape(f"'{name}': gate has shape [3], x has [2]")):
        session.run(None, {"x": ones(2), "gate": ones(3)})


@pytest.mark.parametrize("dtype", ["DOUBLE", "FLOAT16"])
def test_other_dtypes_are_refused_at_load_by_node_name(
    make_gate_model: MakeModel, open_model: OpenModel, library: Path, dtype: str
) -> None:
    with pytest.raises(Exception, match=r"Type Error.*block/gate"):
        open_model(make_gate_model("Gate", dtype=dtype), library=library)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        pytest.param(["batch", 3, "height", 8], ["batch", 3, "height", 8], id="symbolic"),
        pytest.param([2, 3, 4, 8], [2, 3, 4, 8], id="fixed"),
        # A dim without name or value cannot be said through this API: ONNX Runtime would record it as -1.
        pytest.param([None, 3, 4, 8], [], id="unnamed-dim-says-nothing"),
    ],
)
def test_the_graph_knows_the_output_shape(
    make_gate_model: MakeModel,
    open_model: OpenModel,
    library: Path,
    x: list[str | int | None],
    expected: list[str | int],
) -> None:
    session = open_model(make_gate_model("Gate", with_body=False, x=x), library=library)
    assert session.get_outputs()[0].shape == expected


def test_an_input_of_unknown_rank_is_not_taken_for_a_scalar(
    make_gate_model: MakeModel, open_model: OpenModel, library: Path
) -> None:
    model = onnx.load_from_string(make_gate_model("Gate"))
    model.graph.node[0].output[0] = "gated"
    model.graph.node.append(onnx.helper.make_node("Transpose", ["gated"], ["output"], perm=[0, 2, 3, 1]))
    session = open_model(model.SerializeToString(), library=library)
    assert session.run(None, {"x": ones(2, 3, 4, 5), "gate": ones(1, 1, 1, 1)})[0].shape == (2, 4, 5, 3)


def test_sessions_open_and_close_from_many_threads(
    make_gate_model: MakeModel, open_model: OpenModel, library: Path
) -> None:
    model = make_gate_model("Gate", with_body=False)

    def open_and_run(_: int) -> float:
        session = open_model(model, library=library)
        return float(session.run(None, {"x": 2 * ones(1), "gate": 3 * ones(1)})[0][0])

    with ThreadPoolExecutor(8) as workers:
        assert set(workers.map(open_and_run, range(64))) == {6.0}
