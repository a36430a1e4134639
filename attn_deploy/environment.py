"""What the figures were taken on: host, versions, and whether the machine was quiet enough to trust them.

Nothing here imports a runtime, and every file that a system may lack is optional: what cannot be read is None.
`root` stands for the file system's root in every function that reads one.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

from attn_deploy.memory import BYTES_PER_MB

HostFacts = dict[str, str | int | float | None]

ROOT = Path("/")

DISTRIBUTIONS = (
    "attn-deploy",
    "numpy",
    "msgspec",
    "Pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "cuda-core",
    "cuda-bindings",
    "nvidia-ml-py",
    "torch",
    "torchvision",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "timm",
    "transformers",
)

INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "asimddp": "neon_dotprod",
    "i8mm": "neon_i8mm",
}
"""Linux's name for a CPU feature that kernels differ by -> ours, in the order shown."""

_MACOS_INSTRUCTION_SETS = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_DotProd": "neon_dotprod",
    "hw.optional.arm.FEAT_I8MM": "neon_i8mm",
}

THROTTLED_BELOW = 0.6
"""Share of the maximum clock. Heavy AVX-512 alone took the reference machine from 3.9 to 2.67 GHz, 0.68 of it, and that
is how it runs every day; less than this has another cause."""


def host(root: Path = ROOT) -> HostFacts:
    """CPU, cores, memory, instruction sets, load and clocks of this machine now, for the receipt."""
    current_mhz, max_mhz = _clocks_mhz(root)
    return {
        "cpu": _cpu_model(root),
        "architecture": platform.machine(),
        "instruction_sets": " ".join(instruction_sets(root)),
        "logical_cores": available_cores(root),
        "machine_cores": os.cpu_count(),
        "cpu_quota": _cpu_quota(root),
        "memory_total_mb": _memory_total_mb(root),
        "load_average_1min": _load_average(root),
        "cpu_governor": _line(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cpu_mhz": current_mhz,
        "cpu_max_mhz": max_mhz,
        "os": _os_name(root),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Installed versions by distribution, without importing any of them; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        version = installed(name)
        if version is not None:
            found[name] = version
    return found


def runtime_conflict() -> str | None:
    """A message when two flavours of ONNX Runtime are installed: the one installed last overwrote the other's files."""
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    if cpu is None or gpu is None:
        return None
    return (
        f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed and overwrite each other's files: "
        "which of them runs is chance. Keep one: pip uninstall -y onnxruntime onnxruntime-gpu, then "
        'pip install "attn-deploy[cuda]" on a machine with an NVIDIA GPU, else pip install "attn-deploy[cpu]"'
    )


def load_warning(facts: HostFacts | None = None) -> str | None:
    """A message when more wants to run than the machine has cores. Take `facts` before measuring, not after.

    Up to one runnable thread per core is no warning: calibration just before leaves that much load behind itself.
    """
    facts = host() if facts is None else facts
    load, cores = facts.get("load_average_1min"), facts.get("machine_cores")
    if not isinstance(load, int | float) or not isinstance(cores, int) or load <= cores:
        return None
    return (
        f"the machine is loaded: load average {load:.2f} on {cores} cores. Times come out too long; ratios of systems "
        "measured in turns hold better. Measure again when it is quiet"
    )


def throttling_note(facts: HostFacts | None = None) -> str | None:
    """A message when even the fastest core runs far under its maximum clock; None where clocks cannot be read."""
    facts = host() if facts is None else facts
    current, highest = facts.get("cpu_mhz"), facts.get("cpu_max_mhz")
    if not isinstance(current, int | float) or not isinstance(highest, int | float) or highest <= 0:
        return None
    if current >= THROTTLED_BELOW * highest:
        return None
    governor = facts.get("cpu_governor")
    return (
        f"the CPU runs at {current:.0f} of {highest:.0f} MHz"
        + (f" under governor {governor!r}" if governor else "")
        + ": it saves power or is throttled. Times come out too long; ratios of systems measured in turns hold better"
    )


def quiet_note(facts: HostFacts | None = None) -> str:
    """One line on how far the machine could be trusted at that moment: the warnings, or the load without any."""
    facts = host() if facts is None else facts
    notes = [note for note in (load_warning(facts), throttling_note(facts)) if note is not None]
    if notes:
        return "; ".join(notes)
    load = facts.get("load_average_1min")
    if not isinstance(load, int | float):
        return "the machine's load could not be read"
    return f"nothing disturbed the machine: load average {load:.2f} on {facts.get('machine_cores')} cores"


def instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that the CPU has, by our names."""
    info = _text(root / "proc/cpuinfo")
    if info is None:
        return tuple(ours for key, ours in _MACOS_INSTRUCTION_SETS.items() if _sysctl(key) == "1")
    features = set((_field(info, "flags") or _field(info, "Features") or "").split())
    return tuple(ours for linux, ours in INSTRUCTION_SETS.items() if linux in features)


def available_cores(root: Path = ROOT) -> int:
    """Logical cores this process may keep busy: affinity, and the container's quota rounded up; 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def installed(distribution: str) -> str | None:
    """Its version, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model(root: Path) -> str | None:
    info = _text(root / "proc/cpuinfo")
    if info is None:
        return _sysctl("machdep.cpu.brand_string") or platform.processor() or None
    # ARM's cpuinfo has no name, only numbers: implementer and part say which core it is.
    name = _field(info, "model name") or _field(info, "Model")
    implementer, part = _field(info, "CPU implementer"), _field(info, "CPU part")
    return name or (f"implementer {implementer} part {part}" if implementer else None)


def _memory_total_mb(root: Path) -> int | None:
    kib = _field(_text(root / "proc/meminfo") or "", "MemTotal")
    if kib is not None:
        return round(int(kib.split()[0]) * 1024 / BYTES_PER_MB)
    size = _sysctl("hw.memsize")
    return None if size is None else round(int(size) / BYTES_PER_MB)


def _load_average(root: Path) -> float | None:
    line = _line(root / "proc/loadavg")
    if line is not None:
        return float(line.split()[0])
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _clocks_mhz(root: Path) -> tuple[float | None, float | None]:
    """(current, maximum) of the fastest core now: it is the one that runs us, where idle ones sleep on purpose."""
    current = [_khz(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    highest = [_khz(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq")]
    current_mhz = max((khz / 1e3 for khz in current if khz is not None), default=None)
    if current_mhz is None:
        info = _text(root / "proc/cpuinfo") or ""
        values = [line.partition(":")[2] for line in info.splitlines() if line.startswith("cpu MHz")]
        current_mhz = max((float(value) for value in values), default=None)
    return current_mhz, max((khz / 1e3 for khz in highest if khz is not None), default=None)


def _khz(path: Path) -> int | None:
    line = _line(path)
    return int(line) if line is not None and line.isdigit() else None


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of time the control groups grant, the least over the group and those above it; None without one."""
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The folders of this process's CPU groups, version 1 or 2, each with all that stand above it."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, group = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"]
        else:
            continue
        # Inside a container the path may be the host's: the mount's own root, always among the parents, is then right.
        parts = [part for part in group.split("/") if part and part != ".."]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                yield mount.joinpath(*parts[:depth])


def _quota_of(folder: Path) -> float | None:
    line = _line(folder / "cpu.max")
    if line is not None:
        quota, _, period = line.partition(" ")
    else:
        quota = _line(folder / "cpu.cfs_quota_us") or ""
        period = _line(folder / "cpu.cfs_period_us") or ""
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None  # "max" in version 2, -1 in version 1: no limit
    return int(quota) / int(period)


def _os_name(root: Path) -> str:
    for line in (_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return platform.system()


def _field(text: str, name: str) -> str | None:
    """The value of the first `name : value` line."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _line(path: Path) -> str | None:
    text = _text(path)
    return None if text is None or not text.strip() else text.strip()


def _sysctl(name: str) -> str | None:
    """macOS keeps in sysctl what Linux keeps in /proc."""
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
