"""Imports go down only, and what an application loads is light."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx.parser
import pytest
from PIL import Image

from attn_deploy.bundle import write_manifest, writing
from attn_deploy.manifest import SCHEMA_VERSION, Graph, Manifest, Variant
from attn_deploy.preprocess import Preprocess
from attn_deploy.session import DimBounds, TensorSpec

ROOT = Path(__file__).parents[1]
FOLDERS = {"attn_deploy": "attn_deploy", "attn_deploy.export": "export", "attn_deploy.runtimes": "runtimes"}

LAYERS: list[set[str]] = [
    {"cli"},
    {"report.listings"},
    {
        "benchmarking",
        "cli_arguments",
        "cli_cache",
        "cli_options",
        "cli_progress",
        "cli_run",
        "doctor",
        "inspection",
        "retuning",
        "validation",
    },
    {"reference"},
    {"cli_output", "loading", "pipeline", "run_alone"},
    {"graph_export"},
    {"planning"},
    {"options"},
    {"intent", "measuring", "relowering", "searching", "verdict"},
    {"heatmap", "localizing", "peers", "proving", "tuning"},
    {"export", "runtimes"},
    {"judged_samples", "unit_times"},
    {"accuracy", "built", "bundle", "choice", "data", "demo.ablation", "demo.train", "dispatch", "report", "search"},
    {"demo.model", "latency", "manifest", "parity", "readback", "resolutions"},
    {"demo", "demo.blocks", "environment", "gpus", "inputs", "nn", "progress"},
    {"memory", "ops", "picture", "plan_file", "preprocess", "receipt", "session", "weight_map"},
    {"extras", "levels", "precision_plan", "target"},
    {"errors"},
]
"""A module imports from the layers below its own. A name stands for all modules below it that have no other place."""

NETWORKS = {"demo.ablation", "demo.blocks", "demo.model", "demo.train", "nn"}
"""Modules of the base that are PyTorch code; only what is in `export` imports them."""

FOR_MODELS = {"onnx", "onnx_ir", "onnxscript", "timm", "torch", "torchvision", "transformers"}
FOR_THE_TERMINAL = {"rich", "typer"}


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


MODULES = modules()
PLACES = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}


def imports(tree: ast.AST, *, when_loaded: bool = False) -> Iterator[str]:
    """Full names of what is imported; `when_loaded` leaves out what only a call or a type checker imports."""
    for node in ast.iter_child_nodes(tree):
        if when_loaded and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_for_types(node)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        else:
            yield from imports(node, when_loaded=when_loaded)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@functools.cache
def imports_of(module: str, *, when_loaded: bool = False) -> set[str]:
    return set(imports(ast.parse(MODULES[module].read_text()), when_loaded=when_loaded))


def unit_of(module: str) -> str | None:
    """The longest name in LAYERS that the module lies at or below."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in PLACES), None)


# `attn_deploy` itself gives names of every layer when they are asked for; it imports nothing beforehand
OWN = sorted(set(MODULES) - {"attn_deploy"})


def test_every_module_has_its_place() -> None:
    assert [m for m in OWN if unit_of(m) is None] == []


def test_every_place_has_its_module_and_only_one() -> None:
    assert sorted(PLACES) == sorted({unit_of(m) for m in OWN} - {None})
    assert sum(len(layer) for layer in LAYERS) == len(PLACES)


@pytest.mark.parametrize("module", OWN)
def test_imports_go_down_only(module: str) -> None:
    unit = unit_of(module)
    assert unit is not None
    others = {unit_of(name) for name in imports_of(module) if name.startswith("attn_deploy.")} - {unit}
    upward = sorted(str(other) for other in others if other is None or PLACES[other] <= PLACES[unit])
    assert upward == [], f"{module} imports what is beside or above it"


def reached(module: str, seen: set[str] | None = None) -> set[str]:
    """All of our modules that the module imports, directly and through others, when it is loaded or called."""
    seen = set() if seen is None else seen
    for name in imports_of(module):
        if name in MODULES and name not in seen and name != "attn_deploy":
            seen.add(name)
            reached(name, seen)
    return seen


@pytest.mark.parametrize(("one", "other"), [("export", "runtimes"), ("runtimes", "export")])
def test_export_and_runtimes_never_reach_each_other(one: str, other: str) -> None:
    for module in OWN:
        if unit_of(module) == one:
            assert not {name for name in reached(module) if unit_of(name) == other}, module


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module, when_loaded=True)}


BASE = [m for m in OWN if unit_of(m) != "export" and unit_of(m) not in NETWORKS]


def test_the_base_imports_no_package_of_the_exporter_when_it_is_loaded() -> None:
    assert {module: found for module in BASE if (found := packages(module) & FOR_MODELS)} == {}


def test_only_the_exporter_imports_networks() -> None:
    for module in OWN:
        if {unit_of(name) for name in imports_of(module)} & {"demo.model", "demo.blocks", "nn"}:
            assert unit_of(module) in {"export", *NETWORKS}, module


def test_only_the_command_line_and_its_tables_import_typer_and_rich() -> None:
    users = {m.removeprefix("attn_deploy.") for m in OWN if packages(m) & FOR_THE_TERMINAL}
    assert users == {
        "cli", "cli_cache", "cli_options", "cli_output", "cli_progress", "report.listings", "report.terminal",
        "report.tuning",
    }  # fmt: skip


# -- in a fresh process ----------------------------------------------------------------------------------------------


def loaded_after(script: str, *arguments: object) -> set[str]:
    """Top-level packages that a fresh Python has loaded when the script has run."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{script}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))",
            *map(str, arguments),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def make_bundle(out: Path) -> None:
    """Grey images of 4 x 4, and a model that gives two scores: their mean and its negative."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        two_scores (float[batch, 1, 4, 4] image) => (float[batch, 2] scores)
        {
            mean = GlobalAveragePool (image)
            flat = Flatten (mean)
            negative = Neg (flat)
            scores = Concat <axis: int = 1> (flat, negative)
        }""")
    inputs = (TensorSpec("image", "float32", ("batch", 1, 4, 4)),)
    outputs = (TensorSpec("scores", "float32", ("batch", 2)),)
    graph = Graph(inputs, outputs, {"batch": DimBounds()}, {"fp32": Variant("onnxruntime-cpu", "fp32", ("m.onnx",))})
    with writing(out, force=False) as folder:
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        preprocess = Preprocess("image", (4, 4), mode="L", mean=(0.5,), std=(0.5,))
        chosen = {"onnxruntime-cpu": "fp32"}
        manifest = Manifest(
            SCHEMA_VERSION, "two_scores", "a test", {"main": graph}, preprocess, ("light", "dark"), chosen, {}, {}
        )
        write_manifest(folder, manifest)


def test_importing_the_package_loads_not_even_numpy() -> None:
    loaded = loaded_after("import attn_deploy")
    assert "attn_deploy" in loaded
    assert not loaded & {"numpy", "msgspec", "PIL"}


def test_load_is_there_without_the_exporter_and_the_command_line() -> None:
    loaded = loaded_after("import attn_deploy; attn_deploy.load")
    assert {"numpy", "msgspec"} <= loaded
    assert not loaded & (FOR_MODELS | FOR_THE_TERMINAL)


def test_lowering_anew_and_tuning_need_no_pytorch() -> None:
    loaded = loaded_after("import attn_deploy.retuning, attn_deploy.export.levelled, attn_deploy.export.candidates")
    assert "onnx_ir" in loaded
    assert not loaded & {"torch", "onnxscript", "timm", "transformers"}


def test_an_application_classifies_an_image_without_the_exporter_and_the_command_line(tmp_path: Path) -> None:
    make_bundle(tmp_path / "net.attn")
    Image.new("RGB", (9, 7), (250, 250, 250)).save(tmp_path / "white.png")
    script = (
        "import sys, attn_deploy\n"
        "with attn_deploy.load(sys.argv[1], threads=1) as session:\n"
        "    ((best,),) = session.classify([sys.argv[2]])\n"
        "    assert best.label == 'light', best\n"
    )
    loaded = loaded_after(script, tmp_path / "net.attn", tmp_path / "white.png")
    assert {"onnxruntime", "PIL"} <= loaded
    assert not loaded & (FOR_MODELS | FOR_THE_TERMINAL)
