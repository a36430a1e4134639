"""The demo's bundle: its receipt, and what runs in an application."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import attn_deploy
import attn_deploy.demo as demo
from attn_deploy.demo.model import build
from attn_deploy.errors import AttnDeployError
from attn_deploy.parity import sqnr_db
from attn_deploy.receipt import Receipt
from attn_deploy.runtimes import native
from attn_deploy.runtimes import onnxruntime as on_cpu

SAMPLE = demo.SAMPLE_IMAGES / "7_0.png"
MODULES = ["se_block", "cbam_block", "cbam_block", "transformer.attention", "hard_attention", "hard_attention"]


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 1, 16, 16)).astype(np.float32)


def in_pytorch(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return build()(torch.from_numpy(x)).numpy()


def candidates(bundle: Path) -> dict[str, Any]:
    return {c["id"]: c for c in json.loads((bundle / "receipt.json").read_text())["candidates"]}


SKETCH: dict[str, Any] = {
    "schema_version": int, "source": str, "host": dict, "versions": dict,
    "data": {"split": str, "calibration": int, "judgement": int},
    "sites": [{"kind": str, "module": str, "source_line": str, "operator": str, "status": str,
               "reason": (str, type(None)), "flops": int, "bytes": int}],
    "candidates": [{
        "id": str, "target": str, "precision": str, "status": str, "reason": (str, type(None)),
        "sites": [{"module": str, "implementation": str, "provider": str, "nodes": list}],
        "dtype_share": dict, "storage_mb": float,
        "parity": {"inputs": int, "max_abs": float, "max_rel": float, "cosine": float, "sqnr_db": float,
                   "top1_agreement": float, "sites": list},
        "accuracy": {"metric": str, "value": float, "reference": float, "samples": int},
        "latency": {"batch": int, "threads": int, "runs": int, "p50_ms": float, "p90_ms": float, "p99_ms": float,
                    "mean_ms": float, "ci95_ms": list},
        "memory": {"peak_rss_mb": float},
    }],
    "chosen": dict,
}  # fmt: skip
"""The part of the receipt that other programs rely on, with the types of its values for the demo."""


def differences(sketch: Any, found: Any, where: str = "receipt") -> list[str]:
    """Where `found` lacks what the sketch has."""
    if isinstance(sketch, dict):
        missing = [f"{where}.{key} is missing" for key in sketch if key not in found]
        return missing + [d for k, v in sketch.items() if k in found for d in differences(v, found[k], f"{where}.{k}")]
    if isinstance(sketch, list):
        if not found:
            return [f"{where} is empty"]
        return [d for i, item in enumerate(found) for d in differences(sketch[0], item, f"{where}[{i}]")]
    return [] if isinstance(found, sketch) else [f"{where} is {found!r}"]


def test_the_receipt_has_every_promised_field_with_a_value_of_its_type(demo_bundle: Path) -> None:
    assert differences(SKETCH, json.loads((demo_bundle / "receipt.json").read_text())) == []


def test_the_receipt_decodes_as_written_and_is_what_json_printed(demo_bundle: Path, demo_export: Any) -> None:
    content = (demo_bundle / "receipt.json").read_bytes()
    receipt = msgspec.json.decode(content, type=Receipt)
    assert json.loads(msgspec.json.encode(receipt)) == json.loads(content)
    assert json.loads(content) == demo_export.json["receipt"]


def test_every_attention_of_the_demo_is_recognized_where_it_stands(demo_bundle: Path) -> None:
    sites = json.loads((demo_bundle / "receipt.json").read_text())["sites"]
    assert [(s["module"], s["status"]) for s in sites] == [(m, "recognized") for m in MODULES]
    operators = ["GateResidualRelu", "Gate", "GateResidualRelu", "PackedAttention", "HardAttention", "ContextPool"]
    assert [s["operator"] for s in sites] == operators
    for site in sites:
        file, line = site["source_line"].rsplit(":", 1)
        text = (Path(demo.__file__).parents[1] / file.split("attn_deploy/")[-1]).read_text().splitlines()[int(line) - 1]
        assert any(call in text for call in ("gate(", "scaled_dot_product_attention", "topk(", "softmax("))


def test_every_candidate_says_for_every_site_what_runs_it(demo_bundle: Path) -> None:
    rows = candidates(demo_bundle)
    assert {"onnxruntime-cpu-fp32", "onnxruntime-cpu-int8"} <= rows.keys()
    for row in rows.values():
        assert [s["module"] for s in row["sites"]] == MODULES
        assert all(s["provider"] == "CPUExecutionProvider" and s["nodes"] for s in row["sites"])
        assert len(row["parity"]["sites"]) == len(MODULES)


def test_without_the_library_no_site_claims_a_native_kernel(demo_bundle: Path) -> None:
    row = candidates(demo_bundle)["onnxruntime-cpu-fp32"]
    assert not any(s["implementation"].startswith("native:") for s in row["sites"])


@pytest.mark.skipif(not native.status().available, reason=f"native library: {native.status().reason}")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_native_variant_runs_its_gates_in_our_kernels(demo_bundle: Path, precision: str) -> None:
    row = candidates(demo_bundle)[f"onnxruntime-cpu-{precision}-native"]
    ran = [s["implementation"] for s in row["sites"]]
    assert (
        ran[:3]
        == {
            "fp32": ["native:GateResidualRelu", "native:Gate", "native:GateResidualRelu"],
            "int8": ["native:QuantizedGateResidualRelu", "native:QuantizedGate", "native:GateResidualRelu"],
        }[precision]
    )


def test_int8_is_counted_in_multiply_adds_and_its_budget_was_kept(demo_bundle: Path) -> None:
    row = candidates(demo_bundle)["onnxruntime-cpu-int8"]
    assert row["status"] == "passed"
    assert row["weighted_dtype_share"]["int8"] >= 0.9
    assert candidates(demo_bundle)["onnxruntime-cpu-fp32"]["dtype_share"] == {"float32": 1.0}


def test_calibration_and_judgement_are_as_many_as_asked(demo_bundle: Path) -> None:
    data = json.loads((demo_bundle / "receipt.json").read_text())["data"]
    assert (data["calibration"], data["judgement"], data["labelled"]) == (32, 32, True)


def test_load_gives_what_pytorch_gives_on_any_batch(demo_bundle: Path) -> None:
    """On digits: INT8 of convolutions fits what it was calibrated on."""
    with np.load(demo.HELD_OUT) as held_out:
        digits = held_out["image"]
    with attn_deploy.load(demo_bundle, threads=1) as session:
        limit = 60 if "fp32" in session.variant else 20
        for batch in (1, 2, 5):
            some = digits[100 : 100 + batch]
            assert sqnr_db(in_pytorch(some), session(some)) > limit


def test_threads_sleep_where_a_host_is_shared(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    create = on_cpu.create_session

    def observed(model: Any, settings: Any) -> Any:
        opened.append(settings)
        return create(model, settings)

    monkeypatch.setattr(on_cpu, "create_session", observed)
    with attn_deploy.load(demo_bundle, threads=2, spinning=False) as sleeping:
        result = sleeping(images(3))
    with attn_deploy.load(demo_bundle, threads=2) as spinning:
        np.testing.assert_array_equal(result, spinning(images(3)))
    entry = "session.intra_op.allow_spinning"
    assert opened[0].get_session_config_entry(entry) == "0"
    with pytest.raises(RuntimeError, match=entry):  # ONNX Runtime's default
        opened[1].get_session_config_entry(entry)


FRESH = """
import json, sys
import numpy as np
import attn_deploy
with attn_deploy.load(sys.argv[1], threads=1) as session:
    x = np.load(sys.argv[2])
    scores = session(x)
    label = session.classify(sys.argv[3])[0][0].label
heavy = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "onnx", "onnx_ir", "onnxscript", "typer", "rich"})
print(json.dumps({"scores": scores.tolist(), "label": label, "heavy": heavy}))
"""


def test_a_fresh_process_gives_the_same_numbers_and_imports_nothing_of_the_exporter(
    demo_bundle: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", images(3))
    arguments = [sys.executable, "-c", FRESH, str(demo_bundle), str(tmp_path / "x.npy"), str(SAMPLE)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["label"] == "7"
    with attn_deploy.load(demo_bundle, threads=1) as session:
        np.testing.assert_array_equal(np.float32(found["scores"]), session(images(3)))


def test_a_picture_gives_the_same_however_it_comes(demo_bundle: Path) -> None:
    with Image.open(SAMPLE) as picture, attn_deploy.load(demo_bundle, threads=1) as session:
        expected = session.run({"image": session.prepare(SAMPLE)})["output"]
        for given in (SAMPLE, str(SAMPLE), picture, np.asarray(picture), [SAMPLE], SAMPLE.read_bytes()):
            np.testing.assert_array_equal(session(given), expected)
        two = session([SAMPLE, demo.SAMPLE_IMAGES / "3_0.png"])
        assert two.argmax(1).tolist() == [7, 3]


@pytest.mark.parametrize("digit", range(10))
def test_every_sample_image_gets_its_label(demo_bundle: Path, digit: int) -> None:
    with attn_deploy.load(demo_bundle, threads=1) as session:
        best, second = session.classify(demo.SAMPLE_IMAGES / f"{digit}_0.png", top=2)[0]
    assert best.label == str(digit)
    assert best.score > second.score


def test_run_takes_feeds_by_name_and_gives_outputs_by_name(demo_bundle: Path) -> None:
    with attn_deploy.load(demo_bundle, threads=1) as session:
        outputs = session.run({"image": images(2)})
        assert list(outputs) == ["output"]
        np.testing.assert_array_equal(outputs["output"], session(images(2)))


def test_a_torch_tensor_is_taken_as_it_is(demo_bundle: Path) -> None:
    with attn_deploy.load(demo_bundle, threads=1) as session:
        got = session.run({"image": torch.from_numpy(images(2))})["output"]
        np.testing.assert_array_equal(got, session(images(2)))


def test_sixteen_threads_at_once_give_what_one_gives(demo_bundle: Path) -> None:
    with attn_deploy.load(demo_bundle, threads=1) as session:
        inputs = [images(1 + seed % 3, seed) for seed in range(64)]
        expected = [session(x) for x in inputs]
        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(session, inputs))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_closed_session_says_that_it_is_closed(demo_bundle: Path) -> None:
    with attn_deploy.load(demo_bundle, threads=1) as session:
        session(images(1))
    with pytest.raises(AttnDeployError, match="closed"):
        session(images(1))


def with_onnxruntime(path: Path) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """ONNX Runtime as it comes, without our library."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, dict(feeds))


def with_openvino(path: Path) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feeds: [np.array(compiled(dict(feeds))[0])]


@pytest.mark.parametrize(
    ("file", "engine"),
    [("canonical.onnx", with_onnxruntime), ("portable.onnx", with_onnxruntime), ("portable.onnx", with_openvino)],
    ids=["canonical in ONNX Runtime", "portable in ONNX Runtime", "portable in OpenVINO"],
)
def test_other_engines_read_the_models_and_give_what_pytorch_gives(demo_bundle: Path, file: str, engine: Any) -> None:
    run = engine(demo_bundle / file)
    for batch in (1, 3, 8):
        assert sqnr_db(in_pytorch(images(batch)), run({"image": images(batch)})[0]) >= 60
