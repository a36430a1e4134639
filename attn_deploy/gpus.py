"""NVIDIA GPUs of this host, found without any package of NVIDIA's: what doctor and the receipt say of them.

Everything is optional, as in environment.py: `root` stands for the file system's root.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec

ROOT = Path("/")


class Gpus(msgspec.Struct, frozen=True):
    """`names` of the devices, in the driver's order; `driver` its version, None where it does not say."""

    names: tuple[str, ...]
    driver: str | None

    def describe(self) -> str:
        counted = [f"{self.names.count(n)} x {n}" if self.names.count(n) > 1 else n for n in dict.fromkeys(self.names)]
        return ", ".join(counted) + (f", driver {self.driver}" if self.driver else ", driver version unknown")


def nvidia_gpus(root: Path = ROOT) -> Gpus | None:
    """What the kernel's driver shows, else what nvidia-smi says, else device files alone; None without any GPU.

    Containers often have nvidia-smi and the device files without /proc/driver/nvidia, Jetsons have neither of the two.
    """
    return _from_driver(root) or _from_nvidia_smi(root) or _from_device_files(root)


def _from_driver(root: Path) -> Gpus | None:
    names = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        model = re.search(r"^Model:\s*(.+)$", _text(path), re.MULTILINE)
        names.append(model.group(1).strip() if model else "NVIDIA GPU")
    if not names:
        return None
    return Gpus(tuple(names), _driver_version(root))


def _driver_version(root: Path) -> str | None:
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", _text(root / "proc/driver/nvidia/version"))
    return found.group(1) if found else None


def _from_nvidia_smi(root: Path) -> Gpus | None:
    """Asked only on the real file system: a test's root has no programs to run."""
    program = shutil.which("nvidia-smi") if root == ROOT else None
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_nvidia_smi(answer)


def parse_nvidia_smi(answer: str) -> Gpus | None:
    """`NVIDIA H200, 580.159.04`, one line for each GPU -> Gpus."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",") == 1]
    return Gpus(tuple(row[0] for row in rows), rows[0][1]) if rows else None


def _from_device_files(root: Path) -> Gpus | None:
    devices = [p for p in sorted(root.glob("dev/nvidia[0-9]*")) if p.name.removeprefix("nvidia").isdigit()]
    board = _text(root / "proc/device-tree/model").strip("\0\n ")
    if not devices and any((root / name).exists() for name in ("dev/nvhost-gpu", "dev/nvgpu/igpu0")):
        return Gpus((f"integrated GPU of {board}" if board else "integrated NVIDIA GPU",), _driver_version(root))
    return Gpus(("NVIDIA GPU",) * len(devices), _driver_version(root)) if devices else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
