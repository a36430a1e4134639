"""Where a forward pass stopped: the submodule that was running, and the line of the model's own code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

_OURS = str(Path(__file__).resolve().parent)


class ModuleTracker:
    """Knows which submodule is running, so that an error can name it."""

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(m): name for name, m in module.named_modules()}
        self._module = module
        self._stack: list[str] = []

    @contextmanager
    def tracking(self) -> Iterator[None]:
        self._stack.clear()
        handles = []
        for submodule in self._module.modules():
            handles.append(submodule.register_forward_pre_hook(self._enter))
            handles.append(submodule.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def where(self, error: BaseException) -> str:
        """`module blocks.0.attn, model.py:12: x = ...`, as far as it is known where `error` came from."""
        path = self._stack[-1] if self._stack else ""
        line = _user_line(error)
        return f"module {path or '(root)'}" + (f", {line}" if line else "")

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


def _user_line(error: BaseException) -> str:
    """The innermost line outside torch and this package; empty when there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith(_OURS)]
    own = [f for f in own if not f.filename.endswith("/contextlib.py")]
    return f"{own[-1].filename}:{own[-1].lineno}: {(own[-1].line or '').strip()}" if own else ""


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, without the pages that torch adds."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
