"""The command line: messages, exit codes, and one JSON document on stdout."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import attn_deploy.demo as demo
from attn_deploy import bundle as bundles

Cli = Callable[..., Any]
GATED = ("tiny_models:gated", "--weights", "init:0", "--threads", "1", "--precision", "fp32")


@pytest.fixture
def own_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle that a test may damage."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "own.attn"))


def bad_weights(folder: Path) -> Path:
    state = load_file(demo.WEIGHTS)
    state["classifier.wrong"] = state.pop("classifier.weight")
    save_file(state, folder / "bad.safetensors")
    return folder / "bad.safetensors"


def unlabelled(folder: Path) -> Path:
    with np.load(demo.HELD_OUT) as held_out:
        np.savez(folder / "flat.npz", image=held_out["image"][:32])
    return folder / "flat.npz"


BAD_EXPORTS: dict[str, tuple[Callable[[Path], list[Any]], list[str]]] = {
    "a source of no kind": (
        lambda _: ["vit_tiny"],
        ["the source is not understood", "got: vit_tiny", "timm:NAME", "next:"],
    ),
    "a misspelt kind of source": (
        lambda _: ["tim:vit_tiny_patch16_224"],
        ["the module tim cannot be imported", "did you mean timm"],
    ),
    "a misspelt timm model": (
        lambda _: ["timm:vit_tinny_patch16_224"],
        ["timm has no such model", "got: vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"],
    ),
    "a misspelt torchvision model": (
        lambda _: ["torchvision:resnet5O"],
        ["torchvision has no such model", "did you mean resnet50"],
    ),
    "a misspelt factory": (
        lambda _: ["tiny_models:gatd"],
        ["tiny_models has no 'gatd'", "did you mean gated"],
    ),
    "a file that is not there": (
        lambda folder: [folder / "gone.pt2"],
        ["the .pt2 file does not exist", "gone.pt2", "torch.export.save"],
    ),
    "a folder without config": (
        lambda folder: [f"hf:{folder}"],
        ["the model's config cannot be read", "config.json"],
    ),
    "a model that does not trace": (
        lambda _: ["tiny_models:branching"],
        ["the model cannot be traced", "module decide", "tiny_models.py", "if x.sum() > 0", "torch.where"],
    ),
    "weights that do not fit": (
        lambda folder: ["demo", "--weights", bad_weights(folder)],
        ["the weights do not fit demo", "unexpected classifier.wrong", "missing classifier.weight", "--source-arg"],
    ),
    "weights that are not there": (
        lambda folder: ["demo", "--weights", folder / "gone.safetensors"],
        ["the weights file does not exist", "gone.safetensors"],
    ),
    "a shape that contradicts the model": (
        lambda _: ["demo", "--input", "image=1x4x16x16"],
        ["image", "4"],
    ),
    "a shape of another rank": (
        lambda _: ["tiny_models:gated", "--input", "x=1x3x16"],
        ["the model does not run on its example", "check --input against what the model takes"],
    ),
    "an input that the model does not have": (
        lambda _: ["demo", "--input", "picture=1x1x16x16"],
        ["the model's forward has no argument 'picture'", "expected: image"],
    ),
    "data without labels where accuracy was asked": (
        lambda folder: ["demo", "--data", unlabelled(folder), "--max-drop", "1"],
        ["--max-drop asks for accuracy", "label"],
    ),
    "accuracy without data": (
        lambda _: ["demo", "--max-drop", "1"],
        ["--max-drop needs labelled data", "next: add --data"],
    ),
    "data that is not there": (
        lambda folder: ["demo", "--data", folder / "gone.npz"],
        ["there is no such data", "gone.npz"],
    ),
    "a misspelt precision": (
        lambda _: ["demo", "--precision", "int9"],
        ["unknown precision", "got: int9", "did you mean int8"],
    ),
    "a misspelt target": (
        lambda _: ["demo", "--target", "onnxruntime-cpy"],
        ["unknown target", "did you mean onnxruntime-cpu"],
    ),
    "a dynamic dimension without sense": (
        lambda _: ["demo", "--dynamic", "batch=8:2"],
        ["the dynamic dimension is not understood", "got: batch=8:2"],
    ),
    "a source argument without value": (
        lambda _: ["demo", "--source-arg", "depth"],
        ["a source argument is not understood", "got: depth", "NAME=VALUE"],
    ),
}


@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_bad_input_is_told_with_what_was_got_and_expected_and_writes_nothing(
    case: str, attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    arguments, parts = BAD_EXPORTS[case]
    out = tmp_path / "out"
    ran = attn_deploy_cli("export", *arguments(tmp_path), "-o", out / "x.attn")
    assert ran.code == 2, ran.err
    told = " ".join(ran.err.split())
    for part in parts:
        assert part in told
    assert "Traceback" not in told
    assert not out.exists()


@pytest.mark.parametrize("case", ["a misspelt timm model", "weights that do not fit", "a model that does not trace"])
def test_with_json_an_error_is_one_document_with_the_same_parts(
    case: str, attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    arguments, parts = BAD_EXPORTS[case]
    ran = attn_deploy_cli("export", *arguments(tmp_path), "-o", tmp_path / "x.attn", "--json")
    assert ran.code == 2
    error = ran.json["error"]
    assert error["exit_code"] == 2
    assert parts[0] == error["what"]
    assert {"got"} <= error.keys()


def test_with_json_even_a_wrong_option_is_one_document(attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli("export", "--colour", "red", "--json")
    assert ran.code == 2
    assert "--colour" in ran.json["error"]["what"]


def test_an_existing_output_is_kept_without_force(attn_deploy_cli: Cli, own_bundle: Path) -> None:
    before = (own_bundle / "manifest.json").read_bytes()
    ran = attn_deploy_cli("export", *GATED, "-o", own_bundle)
    assert ran.code == 2
    assert "the output exists already" in ran.err
    assert "--force" in ran.err
    assert (own_bundle / "manifest.json").read_bytes() == before


def test_force_replaces_the_whole_bundle_and_underscores_are_dashes(attn_deploy_cli: Cli, own_bundle: Path) -> None:
    assert (own_bundle / "manifest.json").is_file()
    ran = attn_deploy_cli("export", *GATED, "--eval_samples", "3", "--source_arg=", "-o", own_bundle, "--force")
    assert ran.code == 2
    assert "NAME=VALUE" in ran.err
    ran = attn_deploy_cli("export", *GATED, "--calibration_samples=3", "-o", own_bundle, "--force")
    assert ran.code == 0, ran.err
    assert json.loads((own_bundle / "manifest.json").read_text())["source"] == "tiny_models:gated"
    assert [p.name for p in own_bundle.parent.iterdir()] == ["own.attn"]
    assert f"Wrote {own_bundle}" in ran.out.replace("\n", "")


def test_a_full_disk_is_said_and_leaves_nothing(
    attn_deploy_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("attn_deploy.export.build.save_sources", full)
    ran = attn_deploy_cli("export", *GATED, "-o", tmp_path / "x.attn")
    assert ran.code == 1
    assert "the disk is full" in ran.err
    assert "choose another folder" in ran.err
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from attn_deploy import cli, proving
proving.read_back = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
cli.main(["export", "-o", sys.argv[1], "--precision", "fp32"])
"""


def test_a_killed_export_leaves_no_bundle_and_the_next_one_clears_up(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "x.attn"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.glob(".x.attn.*.partial"))) == 1
    assert attn_deploy_cli("export", *GATED, "-o", out).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.attn"]


def test_an_unreadable_image_among_many_is_passed_over_and_listed(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for label in range(4):
        (folder / str(label)).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    (folder / "2" / "5.png").write_bytes(b"no picture")
    (tmp_path / "preprocess.json").write_text(json.dumps({"input": "x", "crop": [16, 16], "resize": 18}))
    ran = attn_deploy_cli(
        "export", *GATED[:-1], "fp32,int8", "--preprocess", tmp_path / "preprocess.json", "--data", folder,
        "--calibration-samples", "8", "--eval-samples", "16", "--min-sqnr", "5", "--max-drop", "100",
        "-o", tmp_path / "x.attn", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    data = ran.json["receipt"]["data"]
    assert len(data["unreadable"]) == 1
    assert "2/5.png" in data["unreadable"][0]
    assert data["calibration"] + data["judgement"] == 23


def test_validate_compares_a_bundle_with_its_own_portable_model(attn_deploy_cli: Cli, demo_bundle: Path) -> None:
    ran = attn_deploy_cli("validate", demo_bundle, "--json")
    assert ran.code == 0, ran.out
    assert ran.json["reference"] == "its own portable FP32 model"
    assert all(c["status"] == "passed" for c in ran.json["candidates"])


def test_validate_takes_the_source_as_reference_and_data(attn_deploy_cli: Cli, demo_bundle: Path) -> None:
    arguments = ["--reference", "demo", "--data", demo.HELD_OUT, "--eval-samples", "16"]
    ran = attn_deploy_cli("validate", demo_bundle, *arguments, "--json")
    assert ran.code == 0, ran.out
    assert ran.json["candidates"][0]["accuracy"]["samples"] == 16


def test_validate_against_other_weights_fails_parity(attn_deploy_cli: Cli, demo_bundle: Path) -> None:
    ran = attn_deploy_cli("validate", demo_bundle, "--reference", "demo", "--weights", "init:0")
    assert ran.code == 3
    assert "is not the same model as demo" in ran.err


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a flipped byte": (lambda b: flip(b / "canonical.onnx"), ["was changed", "canonical.onnx", "sha256"]),
    "a missing file": (lambda b: (b / "portable.onnx").unlink(), ["is missing", "portable.onnx"]),
    "a newer schema": (
        lambda b: edit(b, lambda m: m.update(schema_version=99)),
        ["newer than this attn-deploy", "99", "install a newer attn-deploy"],
    ),
    "a path that climbs out": (
        lambda b: edit(b, lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "size": 1}})),
        ["leaves the bundle", "../x"],
    ),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((bundle / bundles.MANIFEST).read_text())
    change(manifest)
    (bundle / bundles.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_by_validate(damage: str, attn_deploy_cli: Cli, own_bundle: Path) -> None:
    make, parts = DAMAGES[damage]
    make(own_bundle)
    ran = attn_deploy_cli("validate", own_bundle)
    assert ran.code == 2
    for part in parts:
        assert part in ran.err


def test_a_flipped_byte_in_the_chosen_variant_is_refused_by_run(attn_deploy_cli: Cli, own_bundle: Path) -> None:
    flip(next((own_bundle / "variants").glob("*.onnx")))
    ran = attn_deploy_cli("run", own_bundle, demo.SAMPLE_IMAGES / "7_0.png")
    assert ran.code == 2
    assert "was changed" in ran.err


WRONG_FEEDS: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "name": ({"imag": np.zeros((1, 1, 16, 16), np.float32)}, ["not the model's inputs", "did you mean image"]),
    "dtype": ({"image": np.zeros((1, 1, 16, 16), np.float64)}, ["wrong dtype", "float64", ".astype('float32')"]),
    "shape": ({"image": np.zeros((1, 1, 16, 17), np.float32)}, ["wrong shape", "[1, 1, 16, 17]", "image: float32"]),
}


@pytest.mark.parametrize("wrong", WRONG_FEEDS)
def test_run_on_a_wrong_npz_says_what_is_wrong(
    wrong: str, attn_deploy_cli: Cli, demo_bundle: Path, tmp_path: Path
) -> None:
    feeds, parts = WRONG_FEEDS[wrong]
    np.savez(tmp_path / "x.npz", **feeds)
    ran = attn_deploy_cli("run", demo_bundle, tmp_path / "x.npz")
    assert ran.code == 2
    for part in parts:
        assert part in ran.err


def test_a_batch_beyond_the_bound_is_refused_with_the_bound(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "x.attn"
    assert attn_deploy_cli("export", *GATED, "--dynamic", "batch=1:4", "-o", out).code == 0
    for batch, code in ((4, 0), (5, 2)):
        np.savez(tmp_path / "x.npz", x=np.zeros((batch, 3, 16, 16), np.float32))
        ran = attn_deploy_cli("run", out, tmp_path / "x.npz")
        assert ran.code == code
    assert "out of the bundle's bounds" in ran.err
    assert "1 to 4" in ran.err


def test_run_labels_images_and_writes_the_outputs(attn_deploy_cli: Cli, demo_bundle: Path, tmp_path: Path) -> None:
    image = demo.SAMPLE_IMAGES / "7_0.png"
    ran = attn_deploy_cli("run", demo_bundle, image, "--top", "2", "-o", tmp_path / "out.npz", "--json")
    assert ran.code == 0
    (result,) = ran.json
    assert result["input"] == str(image)
    best, second = result["predictions"]
    assert best["label"] == "7"
    assert best["score"] > second["score"]
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["output"].argmax() == 7


def test_run_of_an_image_that_is_none_names_it(attn_deploy_cli: Cli, demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"text")
    ran = attn_deploy_cli("run", demo_bundle, tmp_path / "x.png")
    assert ran.code == 2
    assert "x.png" in ran.err


def test_bench_times_the_bundle_and_its_peer_in_turns(attn_deploy_cli: Cli, demo_bundle: Path, tmp_path: Path) -> None:
    ran = attn_deploy_cli(
        "bench", demo_bundle, "--seconds", "1", "--against", "onnxruntime", "--threads", "1", "--csv",
        tmp_path / "rows.csv", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    bundle, peer = ran.json["rows"]
    assert bundle["system"].startswith("onnxruntime-cpu-")
    assert bundle["ratio"] is None
    assert "onnxruntime" in peer["system"].lower().replace(" ", "")
    assert peer["against"] == bundle["system"] or bundle["system"] in peer["against"]
    assert 0.1 < peer["ratio"] < 10
    assert peer["verdict"] in ("faster", "slower", "no difference")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--against", "onnxruntme"], "did you mean onnxruntime"),
        (["demo", "--batch", "0"], "batch sizes are not understood"),
        (["gone.attn"], "this is not a bundle"),
    ],
)
def test_bench_says_what_it_cannot_measure(arguments: list[str], message: str, attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli("bench", *arguments, "--seconds", "1")
    assert ran.code == 2
    assert message in ran.err


def test_doctor_tells_of_the_target_and_of_the_native_kernels(attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli("doctor", "--json")
    assert ran.code == 0
    checks = {c["name"]: c for c in ran.json["checks"]}
    assert checks["target onnxruntime-cpu"]["ok"] is True
    assert {"native kernels", "export"} <= checks.keys()
    assert "onnxruntime" in ran.json["versions"]
    assert "native kernels" in attn_deploy_cli("doctor").out


def test_inspect_of_a_source_lists_its_sites(attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli("inspect", "tiny_models:gated", "--weights", "init:0", "--json")
    assert ran.code == 0
    assert [(s["module"], s["kind"]) for s in ran.json["sites"]] == [
        ("channels", "channel-gate"), ("pixels", "spatial-gate"),
    ]  # fmt: skip
    assert all("tiny_models.py:" in s["source_line"] for s in ran.json["sites"])


def test_inspect_of_a_bundle_opens_its_variants(attn_deploy_cli: Cli, demo_bundle: Path) -> None:
    ran = attn_deploy_cli("inspect", demo_bundle, "--json")
    assert ran.code == 0
    (variant,) = ran.json["variants"]
    assert variant["chosen"]
    assert set(variant["providers"]) == {"CPUExecutionProvider"}
    assert len(variant["sites"]) == len(ran.json["sites"]) == 6
    assert "transformer.attention" in attn_deploy_cli("inspect", demo_bundle, "--all-sites").out


def test_report_writes_the_receipt_as_one_page(attn_deploy_cli: Cli, demo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    ran = attn_deploy_cli("report", demo_bundle, "-o", tmp_path / "page.html")
    assert ran.code == 0
    page = (tmp_path / "page.html").read_text()
    for site in ("se_block", "cbam_block", "transformer.attention", "onnxruntime-cpu-int8"):
        assert site in page


def test_progress_goes_to_stderr_and_the_document_to_stdout(demo_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "attn_deploy.cli", "inspect", str(demo_bundle), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert len(json.loads(done.stdout)["sites"]) == 6
    assert "inspecting" in done.stderr


def test_too_slow_is_its_own_exit_code(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    ran = attn_deploy_cli("export", *GATED, "--max-latency-ms", "0.000001", "-o", tmp_path / "x.attn", "--json")
    assert ran.code == 5
    assert ran.json["error"]["what"] == "the fastest candidate for onnxruntime-cpu is too slow"
    assert ran.json["receipt"]["candidates"][0]["latency"]["p50_ms"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_missing_runtime_is_exit_6_unless_unproven_is_allowed(
    attn_deploy_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_deploy.runtimes.onnxruntime.availability", lambda: "onnxruntime is not installed")
    ran = attn_deploy_cli("export", *GATED, "-o", tmp_path / "x.attn")
    assert ran.code == 6
    assert "attn-deploy doctor" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_user_s_model_with_two_inputs_goes_from_source_to_bundle(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    import tiny_models

    from attn_deploy import load

    out = tmp_path / "x.attn"
    ran = attn_deploy_cli(
        "export",
        "tiny_models:two_inputs",
        "--source-arg",
        "kinds=9",
        "--precision",
        "fp32",
        "--threads",
        "1",
        "-o",
        out,
    )
    assert ran.code == 0, ran.err
    module = tiny_models.two_inputs(9)[0].eval()
    feeds = {"x": torch.randn(3, 6, 16), "kind": torch.randint(0, 6, (3, 6))}
    with load(out, threads=1) as session, torch.no_grad():
        got, expected = session.run(feeds), module(**feeds)
    assert list(got) == ["scores", "tokens"]
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-5)


def test_help_does_without_torch() -> None:
    code = "import sys; from attn_deploy import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("export", "inspect", "validate", "bench", "run", "report", "doctor"):
        assert command in done.stdout
