"""What doctor makes of a target that does not run here."""

from __future__ import annotations

import importlib.metadata

import pytest

from attn_deploy.doctor import target_check
from attn_deploy.gpus import Gpus
from attn_deploy.target import Target

H200 = Gpus(("NVIDIA H200",), "580.159.04")
GPU_TARGETS = [t for t in Target if t.on_gpu]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("target", GPU_TARGETS, ids=str)
def test_without_a_gpu_a_target_for_gpus_is_no_fault(target: Target) -> None:
    check = target_check(target, "onnxruntime-gpu is not installed", None)
    assert check.ok is None
    assert "no NVIDIA GPU" in check.found
    assert check.next_step is None


@pytest.mark.parametrize(("target", "extra"), [(Target.ONNXRUNTIME_CUDA, "cuda"), (Target.TENSORRT, "tensorrt")])
def test_with_a_gpu_and_no_runtime_the_command_that_adds_it_is_told(
    target: Target, extra: str, nothing_installed: None
) -> None:
    check = target_check(target, "it is not installed", H200)
    assert (check.ok, check.found, check.next_step) == (None, "it is not installed", f"pip install '.[{extra}]'")


@pytest.mark.parametrize("target", GPU_TARGETS, ids=str)
def test_a_runtime_that_is_installed_beside_a_gpu_and_does_not_work_is_a_fault(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1.31.1")
    check = target_check(target, "libcudnn.so.9 is missing; next: pip install nvidia-cudnn-cu13", H200)
    assert (check.ok, check.found) == (False, "libcudnn.so.9 is missing")
    assert check.next_step == "pip install nvidia-cudnn-cu13"


def test_the_command_that_a_reason_ends_with_is_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1.32.0")
    swap = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    check = target_check(Target.ONNXRUNTIME_CUDA, f"onnxruntime 1.32.0 is the CPU flavour: {swap}", H200)
    assert (check.found, check.next_step) == ("onnxruntime 1.32.0 is the CPU flavour", swap)


def test_the_cpu_target_is_never_optional(nothing_installed: None) -> None:
    check = target_check(Target.ONNXRUNTIME_CPU, "onnxruntime is not installed", None)
    assert (check.ok, check.next_step) == (False, "pip install '.[cpu]'")


def test_a_target_that_runs_is_fine() -> None:
    assert target_check(Target.ONNXRUNTIME_CUDA, None, H200).ok is True
