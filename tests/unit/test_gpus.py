"""NVIDIA GPUs told from the files that the driver shows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attn_deploy.gpus import Gpus, nvidia_gpus, parse_nvidia_smi

VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Wed Oct  1 10:11:12 UTC 2026
GCC version:  gcc version 12.2.0
"""
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_driver_names_its_gpus_and_its_version(tmp_path: Path) -> None:
    information = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 57\nGPU UUID: \t GPU-0123\n"
    files = {f"proc/driver/nvidia/gpus/0000:0{i}:00.0/information": information for i in (1, 2)}
    found = nvidia_gpus(write(tmp_path, {**files, "proc/driver/nvidia/version": VERSION}))
    assert found == Gpus(("NVIDIA H200", "NVIDIA H200"), "580.159.04")
    assert found.describe() == "2 x NVIDIA H200, driver 580.159.04"


def test_the_open_kernel_module_says_its_version_elsewhere_in_the_line(tmp_path: Path) -> None:
    files = {"proc/driver/nvidia/version": OPEN_VERSION, "dev/nvidia0": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""}
    assert nvidia_gpus(write(tmp_path, files)) == Gpus(("NVIDIA GPU",), "575.57.08")


def test_a_container_with_device_files_alone_has_a_gpu(tmp_path: Path) -> None:
    found = nvidia_gpus(write(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidia-modeset": ""}))
    assert found == Gpus(("NVIDIA GPU", "NVIDIA GPU"), None)
    assert found.describe() == "2 x NVIDIA GPU, driver version unknown"


def test_a_jetson_is_told_by_its_board(tmp_path: Path) -> None:
    files = {"dev/nvhost-gpu": "", "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"}
    found = nvidia_gpus(write(tmp_path, files))
    assert found == Gpus(("integrated GPU of NVIDIA Jetson Orin Nano Developer Kit",), None)


def test_a_host_without_a_gpu_has_none(tmp_path: Path) -> None:
    assert nvidia_gpus(write(tmp_path, {"dev/null": "", "dev/nvidiactl": ""})) is None


def test_nvidia_smi_is_read_line_by_line() -> None:
    assert parse_nvidia_smi("NVIDIA H200, 580.159.04\nNVIDIA L4, 580.159.04\n") == Gpus(
        ("NVIDIA H200", "NVIDIA L4"), "580.159.04"
    )
    assert parse_nvidia_smi("No devices were found\n") is None


@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA H200, 580.1'; exit 1"])
def test_an_nvidia_smi_that_fails_says_nothing(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _name: str(program))
    from attn_deploy import gpus

    assert gpus._from_nvidia_smi(gpus.ROOT) is None
