"""The real Python bindings of TensorRT, imported in a process of their own upon three empty libraries."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[4]
UNPACKED = "ATTN_DEPLOY_TENSORRT_BINDINGS"
"""A folder with a folder for each further version, made by
`pip install --no-deps --target FOLDER/10.3.0 tensorrt_cu12_bindings==10.3.0`."""

SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getPluginRegistry",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
"""What the bindings are linked to. Each gives a null pointer: no factory makes anything."""

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

_DUMP = """
import json, sys
import tensorrt_bindings as trt

def described(value):
    getter = value.fget if isinstance(value, property) else value
    return (getattr(getter, "__doc__", None) or "").replace("tensorrt_bindings.tensorrt.", "")

classes, others = {}, []
for name, value in vars(trt).items():
    if not isinstance(value, type):
        others.append(name)
        continue
    members = {}
    for key in dir(value):
        member = getattr(value, key)
        static = next((vars(b)[key] for b in value.__mro__ if key in vars(b)), None)
        if isinstance(static, property):
            members[key] = ["property", described(static), static.fset is not None]
        elif isinstance(member, type):
            members[key] = ["class", member.__qualname__, False]
        elif callable(member):
            members[key] = ["method", described(member), key in vars(value)]
        else:
            members[key] = ["value", type(member).__qualname__, False]
    classes[name] = {"bases": [b.__name__ for b in value.__mro__[1:]], "members": members,
                     "enum": sorted(getattr(value, "__members__", {}))}
for name, value in list(classes.items()):
    for key, (kind, text, _) in value["members"].items():
        if kind == "class" and text.startswith(name + "."):
            inner = getattr(getattr(trt, name), key)
            classes[text] = {"bases": [], "enum": sorted(getattr(inner, "__members__", {})),
                             "members": {k: ["value", text, False] for k in dir(inner)}}
json.dump({"version": trt.__version__, "classes": classes, "others": sorted(others)}, sys.stdout)
"""


def folders() -> dict[str, Path]:
    """Version -> the folder that `tensorrt_bindings` lies in: the installed wheel, and those that were unpacked."""
    found = {}
    for major in (13, 12):
        try:
            wheel = importlib.metadata.distribution(f"tensorrt_cu{major}_bindings")
        except importlib.metadata.PackageNotFoundError:
            continue
        found.setdefault(wheel.version, Path(str(wheel.locate_file(""))))
    unpacked = Path(os.environ.get(UNPACKED) or ROOT / "build" / "tensorrt-bindings")
    for info in sorted(unpacked.glob("*/tensorrt_cu*_bindings-*.dist-info")):
        found.setdefault(info.name.split("-")[1].removesuffix(".dist"), info.parent)
    return {version: found[version] for version in sorted(found, key=_numbers)}


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


@functools.cache
def stand_ins(folder: Path, major: int) -> Path:
    """The three libraries of a major version, compiled into the folder."""
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    own = folder / str(major)
    own.mkdir(exist_ok=True)
    for library in LIBRARIES:
        name = f"{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", own / name, source], check=True)
    return own


def environment(bindings: Path, libraries: Path, *more: Path) -> dict[str, str]:
    """The environment of a process that imports these bindings, as `tensorrt` too where `more` says how."""
    paths = os.pathsep.join(map(str, (*more, bindings)))
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": paths}


@functools.cache
def surface(bindings: Path, libraries: Path) -> dict[str, Any]:
    """Every class, member, enumerator and docstring of the bindings."""
    done = subprocess.run(
        [sys.executable, "-c", _DUMP], env=environment(bindings, libraries), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"the bindings in {bindings} cannot be imported: {done.stderr[-2000:]}"
    described: dict[str, Any] = json.loads(done.stdout)
    return described
