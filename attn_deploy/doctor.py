"""doctor: what this host can run, and the one command that adds the rest."""

from __future__ import annotations

import importlib.util
import re

import msgspec

from attn_deploy import environment, runtimes
from attn_deploy.gpus import Gpus, nvidia_gpus
from attn_deploy.runtimes import native
from attn_deploy.runtimes.native import NativeStatus, cuda
from attn_deploy.runtimes.saturation import saturates
from attn_deploy.target import Target


class Check(msgspec.Struct, frozen=True):
    """`ok` None means optional and absent."""

    name: str
    ok: bool | None
    found: str
    next_step: str | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    host: dict[str, str | int | float | None]
    versions: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        return all(c.ok is not False for c in self.checks)


_OPTIONAL = (
    ("export", ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "timm"), "export models", "export"),
    ("torchvision sources", ("torchvision",), "export torchvision:NAME", None),
    ("transformers sources", ("transformers",), "export hf:NAME", None),
    ("HTML report", ("jinja2",), "write report.html", "report"),
    ("OpenVINO", ("openvino",), "measure against OpenVINO", "openvino"),
)


def diagnose() -> Diagnosis:
    """Looks at the host; installs and changes nothing."""
    facts = environment.host()
    gpus = nvidia_gpus()
    checks = [target_check(target, runtimes.availability(target), gpus) for target in Target]
    checks.append(Check("NVIDIA GPU", True if gpus else None, gpus.describe() if gpus else "none on this host"))
    checks.append(kernels_check("native kernels", native.status(), "function bodies"))
    if gpus is not None:
        checks.append(kernels_check("CUDA kernels", cuda.status(), "stock operators"))
    conflict = environment.runtime_conflict()
    if conflict is not None:
        checks.append(Check("one flavour of onnxruntime", False, conflict))
    for name, packages, purpose, extra in _OPTIONAL:
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        command = f"pip install '.[{extra}]'" if extra else f"pip install {' '.join(missing)}"
        found = f"can {purpose}" if not missing else f"cannot {purpose}: {', '.join(missing)} not installed"
        checks.append(Check(name, True if not missing else None, found, command if missing else None))
    checks.append(_int8())
    return Diagnosis(
        host={k: ", ".join(v) if isinstance(v, (list, tuple)) else v for k, v in facts.items()},
        versions=environment.versions(),
        checks=tuple(checks),
    )


_PACKAGES = {
    Target.ONNXRUNTIME_CPU: ("cpu", ("onnxruntime", "onnxruntime-gpu")),
    Target.ONNXRUNTIME_CUDA: ("cuda", ("onnxruntime-gpu",)),
    Target.TENSORRT: ("tensorrt", ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")),
}
"""Target -> the extra that brings its runtime, and the distributions that may hold it."""


def target_check(target: Target, reason: str | None, gpus: Gpus | None) -> Check:
    """`reason`: why the target cannot run here, None where it can.

    A target for GPUs is a fault only where there is a GPU and its runtime is installed and yet does not work: without
    a GPU nothing is missing, and without the runtime the user may not want it.
    """
    name = f"target {target}"
    if reason is None:
        return Check(name, True, "can run and prove bundles")
    if target.on_gpu and gpus is None:
        return Check(name, None, "no NVIDIA GPU on this host: bundles for it can be written with --allow-unproven")
    extra, distributions = _PACKAGES[target]
    why, command = _with_command(reason)
    installed = any(environment.installed(d) for d in distributions)
    broken = installed or not target.on_gpu
    return Check(name, False if broken else None, why, command or f"pip install '.[{extra}]'")


def _with_command(reason: str) -> tuple[str, str]:
    """A reason ends with its command where there is one: `...; next: COMMAND`, or `...: pip install PACKAGES`."""
    why, _, command = reason.partition("; next: ")
    found = re.fullmatch(r"(.*?): (pip (?:un)?install .*)", why)
    return (found.group(1), found.group(2)) if found and not command else (why, command)


def kernels_check(name: str, status: NativeStatus, otherwise: str) -> Check:
    """`otherwise`: what runs where there are none."""
    if status.available:
        isa = f" with {status.instruction_set}" if status.instruction_set else ""
        return Check(name, True, f"{len(status.operators)} operators{isa}, version {status.version}, {status.path}")
    reason, _, command = (status.reason or "not there").partition("; next: ")
    if status.fault:
        return Check(name, False, reason, command)
    return Check(name, None, f"{reason}: {otherwise} run instead", command or None)


def _int8() -> Check:
    name = "INT8 on this CPU"
    fast = [s for s in environment.instruction_sets() if "vnni" in s or "amx" in s or "dotprod" in s]
    if saturates():
        return Check(
            name, None, "no dot products of 8 bits: INT8 multiplies in 16 bits, so that nothing saturates, and may be "
            "slower than FP32",
        )  # fmt: skip
    return Check(name, True, f"dot products in hardware: {', '.join(fast)}" if fast else "multiplies in 16 bits")
