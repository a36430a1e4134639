"""Plans as files: what is read, what is refused, and which layer gets which scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_deploy.errors import UsageError
from attn_deploy.plan_file import Layer, encode_plan, read_plan, resolved
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme

LINEAR = (Scheme.PER_TOKEN, Scheme.STATIC, Scheme.WEIGHT_ONLY)
LAYERS = (
    Layer("stem/Conv", (Scheme.STATIC,)),
    Layer("blocks.0.mlp.fc1/MatMul", LINEAR),
    Layer("blocks.0.mlp.fc2/MatMul", LINEAR),
    Layer("blocks.1.mlp.fc1/MatMul", LINEAR),
    Layer("blocks.10.mlp.fc1/MatMul", LINEAR),
    Layer("odd/Gemm", ()),
)
NORMS = ("blocks.0.norm/LayerNormalization", "blocks.1.norm/LayerNormalization")


def plan(*layers: tuple[str, Scheme], **more: Any) -> PrecisionPlan:
    return PrecisionPlan(tuple(LayerPlan(name, scheme) for name, scheme in layers), **more)


def schemes(found: PrecisionPlan) -> dict[str, str]:
    return {p.layer: p.scheme.value for p in found.layers}


# -- which layer gets what -------------------------------------------------------------------------------------------


def test_the_most_specific_name_wins_whatever_the_order() -> None:
    given = plan(
        ("blocks.0.mlp.fc2/MatMul", Scheme.WEIGHT_ONLY), ("", Scheme.PER_TOKEN), ("blocks.0", Scheme.FLOAT),
    )  # fmt: skip
    for layers in (given.layers, given.layers[::-1]):
        assert schemes(resolved(PrecisionPlan(layers), LAYERS, NORMS)) == {
            "stem/Conv": "int8-static",
            "blocks.0.mlp.fc1/MatMul": "float",
            "blocks.0.mlp.fc2/MatMul": "int8-weights",
            "blocks.1.mlp.fc1/MatMul": "int8-per-token",
            "blocks.10.mlp.fc1/MatMul": "int8-per-token",
            "odd/Gemm": "float",
        }


def test_a_module_ends_at_a_dot_and_what_no_name_covers_stays_float_with_a_reason() -> None:
    found = resolved(plan(("blocks.1", Scheme.PER_TOKEN)), LAYERS, NORMS)
    assert found.quantized == ("blocks.1.mlp.fc1/MatMul",)
    reasons = {p.layer: p.reason for p in found.layers}
    assert "names it nowhere" in reasons["blocks.10.mlp.fc1/MatMul"]


def test_a_layer_without_a_form_in_a_modules_scheme_says_why_it_stays_float() -> None:
    found = resolved(plan(("", Scheme.WEIGHT_ONLY)), LAYERS, NORMS)
    reasons = {p.layer: p.reason for p in found.layers if p.scheme is Scheme.FLOAT}
    assert reasons.keys() == {"stem/Conv", "odd/Gemm"}
    assert "no form in the scheme of '(the whole model)'" in reasons["stem/Conv"]


def test_a_smoothed_norm_may_be_named_by_its_module() -> None:
    found = resolved(plan(smoothing={"blocks.1.norm": 0.5, NORMS[0]: 0.15}), LAYERS, NORMS)
    assert found.smoothing == {NORMS[1]: 0.5, NORMS[0]: 0.15}


REFUSED: dict[str, tuple[PrecisionPlan, str, str]] = {
    "a module that is not there": (plan(("blocks.2", Scheme.PER_TOKEN)), "blocks.2", "did you mean blocks."),
    "a node that is not there": (
        plan(("blocks.0.mlp.fc1/Gemm", Scheme.FLOAT)), "blocks.0.mlp.fc1/Gemm", "blocks.0.mlp.fc1/MatMul",
    ),
    "a node without that form": (plan(("stem/Conv", Scheme.PER_TOKEN)), "int8-per-token", "float, int8-static"),
    "a node without any form": (plan(("odd/Gemm", Scheme.PER_TOKEN)), "int8-per-token", "float"),
    "a norm that is not there": (plan(smoothing={"blocks.0.nrm": 0.5}), "blocks.0.nrm", "did you mean blocks.0.norm"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_name_that_is_not_in_the_model_is_refused_with_the_nearest(case: str) -> None:
    given, got, expected = REFUSED[case]
    with pytest.raises(UsageError) as error:
        resolved(given, LAYERS, NORMS)
    assert error.value.got == got
    assert expected in str(error.value.expected)
    assert error.value.exit_code == 2


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = PrecisionPlan(
        (LayerPlan("a/MatMul", Scheme.PER_TOKEN, "searched"), LayerPlan("b/Conv", Scheme.STATIC)),
        {"norm/LayerNormalization": 0.15}, equalized=True, corrected=True,
    )  # fmt: skip
    (tmp_path / "plan.json").write_bytes(encode_plan(given))
    assert read_plan(tmp_path / "plan.json") == given


ENTRY = {"layer": "a", "scheme": "float"}
BAD_FILES: dict[str, tuple[str, str]] = {
    "not JSON": ("{layers", "not understood"),
    "cut off": (json.dumps({"layers": [ENTRY]})[:-3], "not understood"),
    "no layers": ('{"version": 1}', "missing required field `layers`"),
    "an unknown field": (json.dumps({"layers": [ENTRY], "laers": []}), "unknown field `laers`"),
    "an unknown field of a layer": (json.dumps({"layers": [{**ENTRY, "why": ""}]}), "unknown field `why`"),
    "an unknown scheme": (
        json.dumps({"layers": [{**ENTRY, "scheme": "int8-per-tokn"}]}),
        "did you mean int8-per-token",
    ),
    "a layer twice": (json.dumps({"layers": [ENTRY, ENTRY]}), "names a layer twice"),
    "a strength beyond 1": (json.dumps({"layers": [], "smoothing": {"n": 1.5}}), "out of range"),
    "a newer version": (json.dumps({"version": 2, "plan": {}}), "of another version"),
    "a list": ("[]", "not understood"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_plan_is_refused_with_its_file(case: str, tmp_path: Path) -> None:
    content, told = BAD_FILES[case]
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UsageError) as error:
        read_plan(tmp_path / "plan.json")
    assert told in str(error.value)
    assert "plan.json" in str(error.value.where)


@pytest.mark.parametrize("name", ["gone.json", "."])
def test_a_plan_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not understood"):
        read_plan(tmp_path / "plan.json")
