"""The original model in PyTorch on a GPU, eager or under torch.compile: what users would run without us."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from attn_deploy.errors import UsageError
from attn_deploy.export.capture import CapturedModel
from attn_deploy.latency import System
from attn_deploy.session import Array
from attn_deploy.target import Precision

COMPILE_MODE = "max-autotune"
"""The mode that searches kernels and replays CUDA graphs: the strongest that torch.compile offers."""

_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


class TorchOnGpu:
    """A copy of the module on the GPU, its weights in `precision`; float inputs are cast on the device.

    INT8 is compared with FP16: PyTorch has no INT8 of its own here. In FP32 convolutions compute in FP32 and not in
    TF32, as the sessions do.
    """

    def __init__(self, captured: CapturedModel, precision: Precision, *, compiled: bool, device: str = "cuda") -> None:
        """Raises UsageError for a saved program, whose device and types are part of its graph."""
        if isinstance(captured.module, torch.fx.GraphModule):
            raise UsageError(
                "a saved program cannot be moved to the GPU to be timed there", got=".pt2",
                expected="a source with a module: timm:, torchvision:, hf:, package.module:factory",
                next_step="leave eager and compile out of --against",
            )  # fmt: skip
        self._device = torch.device(device)
        self._dtype = _DTYPES.get(precision, torch.float16)
        self._outputs = captured.outputs
        module = copy.deepcopy(captured.module).eval().to(self._device, self._dtype)
        if self._dtype is torch.float32:
            torch.backends.cudnn.allow_tf32 = False
        self._call: Any = torch.compile(module, mode=COMPILE_MODE) if compiled else module

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Host arrays to host arrays, outputs as FP32: both copies are part of it."""
        with torch.inference_mode():
            leaves = self._leaves(self._on_device(feeds))
            return {n: _to_host(leaf) for n, leaf in zip(self._outputs, leaves, strict=True)}

    def resident(self, name: str, feeds: Mapping[str, Array]) -> System:
        """Calls on inputs that are on the GPU already, and whose results stay there."""
        with torch.inference_mode():
            tensors = self._on_device(feeds)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def call() -> None:
            with torch.inference_mode():
                torch.compiler.cudagraph_mark_step_begin()
                begin.record()
                self._call(**tensors)
                end.record()
                end.synchronize()

        return System(name, call, device_ms=lambda: begin.elapsed_time(end))

    def _on_device(self, feeds: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in feeds.items()}
        return {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def _leaves(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        result = self._call(**tensors)
        return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _to_host(leaf: torch.Tensor) -> Array:
    return (leaf.float() if leaf.is_floating_point() else leaf).cpu().numpy()
