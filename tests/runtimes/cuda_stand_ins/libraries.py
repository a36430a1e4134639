"""Compiles the stand-in libraries, and says with which environment a process uses them."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = HERE / "src"
INSTALL = "pip install --no-deps --target build/onnxruntime-gpu onnxruntime-gpu cuda-core nvidia-ml-py"

LIBRARIES = {
    # library: (source, prefix of the functions that the provider looks up by name when first used)
    "libcuda.so.1": ("cuda.c", None),
    "libcudart.so.13": ("cudart.c", None),
    "libcublas.so.13": ("mathematics.c", "cublas"),
    "libcublasLt.so.13": ("mathematics.c", "cublasLt"),
    "libcudnn.so.9": ("mathematics.c", "cudnn"),
    "libcurand.so.10": ("mathematics.c", "curand"),
    "libcufft.so.12": ("mathematics.c", "cufft"),
    "libnvrtc.so.13": ("mathematics.c", "nvrtc"),
    "libnvidia-ml.so.1": ("nvml.c", None),
    # the list of all kernels asks the wheel's TensorRT provider too
    "libnvinfer.so.10": ("mathematics.c", None),
    "libnvonnxparser.so.10": ("mathematics.c", None),
}


def onnxruntime_gpu() -> Path | None:
    """The folder that the onnxruntime-gpu wheel was unpacked to, with cuda-core and nvidia-ml-py beside it."""
    given = os.environ.get("ATTN_DEPLOY_ORT_GPU")
    folder = Path(given) if given else ROOT / "build" / "onnxruntime-gpu"
    return folder if (folder / "onnxruntime").is_dir() else None


def headers() -> Path | None:
    """The folder of cuda.h, from the nvidia-cuda-runtime package that torch brings."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"
    return folder if (folder / "cuda.h").is_file() else None


def missing() -> str | None:
    """Why the stand-ins cannot be used here, and the command; None when they can."""
    if onnxruntime_gpu() is None:
        return f"the onnxruntime-gpu wheel is not unpacked here: {INSTALL}"
    if headers() is None:
        return "CUDA 13's headers are not here: pip install nvidia-cuda-runtime"
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        return "gcc and nm are not here: apt install gcc binutils"
    return None


def missing_for_sessions() -> str | None:
    """Why our own sessions cannot run upon the stand-ins here, and the command; None when they can."""
    wheel = onnxruntime_gpu()
    places = [wheel, Path(sysconfig.get_path("purelib"))] if wheel is not None else []
    for package in ("cuda/core", "cuda/bindings", "pynvml.py"):
        if places and not any((place / package).exists() for place in places):
            return f"{package} is not here: {INSTALL}"
    return missing()


def build(folder: Path) -> Path:
    """The folder with the libraries, compiled once for the wheel and these sources below `folder`."""
    wheel, cuda = onnxruntime_gpu(), headers()
    assert wheel is not None, missing()
    assert cuda is not None, missing()
    provider = wheel / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    key = hashlib.sha256(str((provider.resolve(), provider.stat().st_size, provider.stat().st_mtime_ns)).encode())
    for source in [Path(__file__), *sorted(SOURCES.rglob("*.*"))]:
        key.update(source.read_bytes())
    done = folder / key.hexdigest()[:16]
    if done.is_dir():
        return done
    work = folder / f"{done.name}.{os.getpid()}"
    work.mkdir(parents=True)
    try:
        names = _names(provider)
        for library in LIBRARIES:
            _compile(library, names, work, cuda)
        work.rename(done)
    except OSError:
        if not done.is_dir():
            raise  # else another process was first
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return done


def _names(provider: Path) -> dict[str, set[str]]:
    """For each library the functions that the provider wants: linked to by name, or looked up when first used."""
    linked = [provider, provider.with_name("libonnxruntime_providers_tensorrt.so")]
    text = subprocess.run(["nm", "-D", "--undefined-only", *linked], capture_output=True, text=True, check=True).stdout
    names: dict[str, set[str]] = {library: set() for library in LIBRARIES}
    for name, library in re.findall(r" U (\w+)@(lib[\w.]+)", text):
        if library in names:
            names[library].add(name)
    names["libnvinfer.so.10"].update(re.findall(r" U (createInfer\w+|getInferLibVersion|getPluginRegistry)", text))
    names["libnvonnxparser.so.10"].update(re.findall(r" U (createNvOnnx\w+)", text))
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        for found in re.finditer(rb"\0((cudnn|cufft|nvrtc|curand)[A-Z]\w+)(?=\0)", binary):
            prefix = found[2].decode()
            library = next(lib for lib, (_, own) in LIBRARIES.items() if own == prefix)
            names[library].add(found[1].decode())
    return names


def _compile(library: str, names: dict[str, set[str]], folder: Path, cuda: Path) -> None:
    """The handwritten functions, and for every other name one that notes its call and succeeds."""
    source, _ = LIBRARIES[library]
    stem = library.partition(".")[0].removeprefix("lib")
    rest = folder / f"{stem}_rest.c"
    lines = ['#include "stand_in.h"']
    lines += [
        f'__attribute__((weak)) int {name}(void) {{ return stand_in_call("{name}", 0, 0); }}'
        for name in sorted(names[library])
    ]
    rest.write_text("\n".join(lines) + "\n")
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-I{SOURCES}", f"-I{cuda}", f"-Wl,-soname,{library}"]
    if library == "libcuda.so.1":
        inputs, links = [SOURCES / source, SOURCES / "state.c", rest], ["-lpthread", "-ldl"]
    else:
        flags.append(f"-DSTAND_IN_{stem.upper().replace('-', '_')}")
        inputs, links = [SOURCES / source, rest], [f"-L{folder}", "-l:libcuda.so.1", "-ldl"]
    if stem.startswith("cu"):  # NVIDIA gives their symbols the library's name as their version
        version = folder / f"{stem}.map"
        version.write_text(f"{library} {{ global: *; }};\n")
        flags.append(f"-Wl,--version-script={version}")
    subprocess.run(["gcc", *flags, "-o", folder / library, *inputs, *links], check=True)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that imports the real onnxruntime-gpu upon the stand-ins in `folder`."""
    wheel = onnxruntime_gpu()
    assert wheel is not None, missing()
    libraries = os.pathsep.join(p for p in (str(folder), os.environ.get("LD_LIBRARY_PATH")) if p)
    python = os.pathsep.join(p for p in (str(wheel), str(HERE.parent), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "LD_LIBRARY_PATH": libraries, "PYTHONPATH": python, "OMP_NUM_THREADS": "1"}
