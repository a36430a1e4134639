"""validate --localize names the module in which a fault was planted, and nothing in a healthy bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.bundle import open_bundle, write_manifest
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.lowered import Alternative
from attn_deploy.runtimes import native

Cli = Callable[..., Any]
VIT = ("timm:vit_tiny_patch16_224", "--source-arg", "img_size=32", "--source-arg", "depth=3")
PLAIN = ("transformers_in_miniature:plain", "--weights", "init:package")
"""With weights that do not depend on the model's arguments: our initializer tunes them to the scale of the scores."""
WRONG = (*PLAIN, "--source-arg", "factor=1.5")


@pytest.fixture(scope="module")
def bundles(attn_deploy_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a source in one precision, once; without the native library, whose operators hold several modules: then
    every module is a block of its own."""
    made: dict[tuple[str, ...], Path] = {}

    def bundle(precision: str, *source: str) -> Path:
        if (precision, *source) not in made:
            out = tmp_path_factory.mktemp("bundle") / "x.attn"
            weights = () if "--weights" in source else ("--weights", "init:0")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "library_folders", lambda: iter(()))
                options = ("--precision", precision, "--threads", "1", "-o", out)
                ran = attn_deploy_cli("export", *source, *weights, *options)
            assert ran.code == 0, ran.err
            made[precision, *source] = out
        return made[precision, *source]

    return bundle


def damaged(bundle: Path, out: Path, plant: Callable[[ir.Model], str]) -> tuple[Path, str]:
    """A copy of the bundle with a fault in its variant, whole as far as its hashes tell; and the module at fault."""
    shutil.copytree(bundle, out)
    (file,) = (out / "variants").glob("*.onnx")
    model = ir.load(file)
    node_name = plant(model)
    ir.save(model, file)
    write_manifest(out, open_bundle(bundle).manifest)
    return out, node_name.rpartition("/")[0].partition("/")[0]


def below(model: ir.Model, prefix: str, *operators: str) -> Iterator[ir.Node]:
    return (n for n in model.graph if str(n.name).startswith(prefix) and (not operators or n.op_type in operators))


def wrong_scale(model: ir.Model) -> str:
    """The factor of the scores grows by a quarter."""
    scale = next(n for n in below(model, "blocks.1.attn/", "Constant") if n.outputs[0].name.endswith("/scale_value"))
    value = scale.attributes["value_float"].as_float()
    scale.attributes["value_float"] = ir.AttrFloat32("value_float", value * 1.25)
    return str(scale.name)


def change(value: ir.Value, edit: Callable[[np.ndarray[Any, Any]], Any]) -> None:
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    value.const_value = ir.tensor(edit(array).astype(array.dtype), name=value.name)


def with_constant(model: ir.Model, prefix: str, least: int, *dtypes: ir.DataType) -> tuple[ir.Node, ir.Value]:
    """The first node below `prefix` that reads a constant of at least so many elements, and that constant."""
    return next(
        (node, value)
        for node in below(model, prefix)
        for value in node.inputs
        if value is not None and value.const_value is not None
        if value.dtype in dtypes and value.const_value.size >= least
    )


def swapped_window(model: ir.Model) -> str:
    """The last token of a window and the first of the next one change places."""
    node, order = with_constant(model, "layers.1.attn", 16, ir.DataType.INT64)

    def swap(array: np.ndarray[Any, Any]) -> Any:
        flat = array.reshape(-1)
        flat[[3, 4]] = flat[[4, 3]]
        return flat.reshape(array.shape)

    change(order, swap)
    return str(node.name)


def shifted_mask(model: ir.Model) -> str:
    """Each query sees the key after those it should see, and not the first of them. A constant mask may be a bias."""
    node, mask = with_constant(model, "layers.1.attn/", 256, ir.DataType.BOOL, ir.DataType.FLOAT)
    change(mask, lambda array: np.roll(array, 1, axis=-1))
    return str(node.name)


def saturated_linear(model: ir.Model) -> str:
    """The scale of the int8 weight is a quarter of what it should be."""
    name = "blocks.1.mlp.fc1/MatMul"
    held = model.graph.initializers
    change(next(held[n] for n in held if n.startswith(f"{name}/") and n.endswith("weight_scale")), lambda s: s / 4)
    return name


def saturated_conv(model: ir.Model) -> str:
    """The convolution's output is clipped to a quarter of its range."""
    name = "middle/Conv"
    change(model.graph.initializers[f"{name}/output_scale"], lambda scale: scale / 4)
    return name


FAULTS: dict[str, tuple[Callable[[ir.Model], str], str, tuple[str, ...]]] = {
    "a wrong scale": (wrong_scale, "fp32", VIT),
    "a wrong scale in an INT8 model": (wrong_scale, "int8", VIT),
    "a swapped window": (swapped_window, "fp32", ("transformers_in_miniature:windowed",)),
    "an off-by-one mask": (shifted_mask, "fp32", ("transformers_in_miniature:masked",)),
    "a saturated INT8 linear layer": (saturated_linear, "int8", VIT),
    "a saturated INT8 convolution": (saturated_conv, "int8", ("tiny_models:gated",)),
}


ALSO_SLOW = ("a wrong scale in an INT8 model", "an off-by-one mask")
"""Under `make test-all`: others differ from them in little."""


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if fault in ALSO_SLOW else ()) for fault in FAULTS]
)
def test_a_planted_fault_is_named_by_its_module(
    fault: str, bundles: Callable[..., Path], attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    plant, precision, source = FAULTS[fault]
    bundle, module = damaged(bundles(precision, *source), tmp_path / "x.attn", plant)
    ran = attn_deploy_cli("validate", bundle, "--localize", "--threads", "1", "--json")
    assert ran.code == 3
    assert f"module {module} (" in ran.json["error"]["where"]
    (found,) = ran.json["validation"]["localized"]
    assert found["first"]["module"] == module
    # a smoothed norm gives other values than the reference's: the layer behind it is cut in front of it
    assert found["first"]["between"] in ([], ["blocks.1.norm2"] if plant is saturated_linear else [])
    assert found["first"]["sqnr_db"] < found["first"]["min_sqnr_db"]
    assert found["first"]["runs"]
    assert not found["first"]["passed"]
    # what reads a quantized output is cut in front of that quantization, so that its integer kernel runs
    assert found["out_of_tolerance"] == (3 if plant is saturated_conv else 1)


@pytest.mark.parametrize(
    ("precision", "source"),
    [("fp32", VIT), ("int8", VIT), pytest.param("fp16", VIT, marks=pytest.mark.slow), ("int8", ("tiny_models:gated",)),
     ("fp32", ("transformers_in_miniature:windowed",)), ("fp32", ("transformers_in_miniature:masked",))],
)  # fmt: skip
def test_a_healthy_bundle_names_nothing(
    precision: str, source: tuple[str, ...], bundles: Callable[..., Path], attn_deploy_cli: Cli
) -> None:
    ran = attn_deploy_cli("validate", bundles(precision, *source), "--localize", "--threads", "1", "--json")
    assert ran.code == 0, ran.out
    (found,) = ran.json["localized"]
    assert found["first"] is None
    assert found["out_of_tolerance"] == 0
    assert found["blocks"] > 10
    assert all(row["passed"] for row in found["worst"])


def test_the_terminal_says_first_which_module_and_by_how_much(
    bundles: Callable[..., Path], attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    healthy = bundles("fp32", *VIT)
    ran = attn_deploy_cli("validate", healthy, "--localize", "--threads", "1")
    assert "blocks alone is within its tolerance" in ran.out
    bundle, _ = damaged(healthy, tmp_path / "x.attn", wrong_scale)
    ran = attn_deploy_cli("validate", bundle, "--localize", "--threads", "1")
    (row,) = (line for line in ran.out.splitlines() if line.startswith("FIRST"))
    assert "blocks.1.attn" in row
    assert "1 of" in ran.out
    assert "where:" in ran.err
    assert "module blocks.1.attn (PackedAttention)" in ran.err


def test_without_localize_the_error_says_how_to_find_the_module(
    bundles: Callable[..., Path], attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    bundle, _ = damaged(bundles("fp32", *VIT), tmp_path / "x.attn", wrong_scale)
    ran = attn_deploy_cli("validate", bundle, "--threads", "1", "--json")
    assert ran.code == 3
    assert "--localize" in ran.json["error"]["next"]
    assert ran.json["validation"]["localized"] == []


def test_a_fault_of_the_model_itself_is_named_against_its_source(
    bundles: Callable[..., Path], attn_deploy_cli: Cli
) -> None:
    """The faulty layer has an operation more, so that later values of the two graphs have other numbers."""
    arguments = ("validate", bundles("fp32", *WRONG), "--localize", "--threads", "1", "--json", "--reference")
    ran = attn_deploy_cli(*arguments, *PLAIN)
    assert ran.code == 3
    (found,) = ran.json["validation"]["localized"]
    assert found["first"]["module"] == "layers.1.attn"
    assert found["reference_sqnr_db"] > 60
    same = attn_deploy_cli(*arguments, *WRONG)
    assert same.code == 0, same.out
    assert same.json["localized"][0]["first"] is None


def test_another_bundle_is_a_reference_block_by_block(bundles: Callable[..., Path], attn_deploy_cli: Cli) -> None:
    wrong, right = bundles("fp32", *WRONG), bundles("fp32", *PLAIN)
    ran = attn_deploy_cli("validate", wrong, "--localize", "--reference", right, "--threads", "1", "--json")
    assert ran.code == 3
    assert ran.json["validation"]["localized"][0]["first"]["module"] == "layers.1.attn"


def test_an_export_that_fails_parity_names_the_module(
    attn_deploy_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = onnxruntime_cpu.lower

    def faulty(*args: Any, **kwargs: Any) -> Any:
        lowered = lower(*args, **kwargs)
        wrong_scale(lowered.model)
        return lowered

    monkeypatch.setattr(onnxruntime_cpu, "lower", faulty)
    monkeypatch.setattr(native, "library_folders", lambda: iter(()))  # the scale is a constant of the function body
    ran = attn_deploy_cli(
        "export", *VIT, "--weights", "init:0", "--precision", "fp32", "--threads", "1", "-o", tmp_path / "x.attn",
        "--json",
    )  # fmt: skip
    assert ran.code == 3
    assert "onnxruntime-cpu-fp32, module blocks.1.attn (PackedAttention)" in ran.json["error"]["where"]
    assert list(tmp_path.iterdir()) == []


def wrong_weight(model: ir.Model, form: str, module: str, operand: int) -> None:
    """A constant of the operator that holds a whole block grows by a tenth."""
    node = next(n for n in below(model, module) if n.op_type.startswith(form))
    weight = node.inputs[operand]
    assert weight is not None
    change(weight, lambda array: array * 1.1)


FUSED: dict[str, tuple[tuple[str, ...], str, str, int]] = {
    "a feed-forward block": (VIT, "FeedForwardGelu", "blocks.1.mlp", 5),
    "an attention block": (("transformers_in_miniature:windowed",), "AttentionBlockIndexed", "layers.1.attn", 5),
}
"""What is exported; the operator, its module and which of its operands is wrong: weight2, weight_out."""


@pytest.mark.parametrize("block", FUSED)
def test_a_fault_inside_a_fused_block_is_named_by_the_module_of_the_block(
    block: str, attn_deploy_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values inside are gone: the block is tried whole."""
    source, form, module, operand = FUSED[block]
    kernels = frozenset(native.kernel_names())
    if not kernels:
        pytest.skip("no native kernels on this CPU")
    lower = onnxruntime_cpu.lower

    def faulty(*args: Any, **kwargs: Any) -> Any:
        lowered = lower(*args, **{**kwargs, "native": kernels, "fuse": None})
        wrong_weight(lowered.model, form, module, operand)
        return lowered

    monkeypatch.setattr(onnxruntime_cpu, "lower", faulty)
    monkeypatch.setattr(onnxruntime_cpu, "alternatives", lambda *_: (Alternative("-native"),))
    ran = attn_deploy_cli(
        "export", *source, "--weights", "init:0", "--precision", "fp32", "--no-tune", "--threads", "1",
        "-o", tmp_path / "x.attn", "--json",
    )  # fmt: skip
    assert ran.code == 3
    where = ran.json["error"]["where"]
    assert where.startswith(f"onnxruntime-cpu-fp32-native, module {module.rpartition('.')[0]} (")
    assert module in where
