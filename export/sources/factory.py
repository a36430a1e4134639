"""`package.module:factory`: a module of the user's own, found on the Python path or in the working folder.

The factory returns a torch module, or a pair (module, example inputs by forward-argument name).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_deploy.errors import UsageError
from attn_deploy.export.sources.base import LoadedSource, SourceRequest, accepted_inputs, load_weights
from attn_deploy.inputs import ExampleInput
from attn_deploy.target import nearest


def load(request: SourceRequest) -> LoadedSource:
    factory = _find(request.name)
    try:
        made = factory(**(request.arguments or {}))
    except Exception as error:
        raise UsageError(
            f"{request.name} raised {type(error).__name__}",
            got=str(error),
            next_step="check --source-arg against the factory's arguments",
        ) from error
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(module, nn.Module) or not isinstance(example, Mapping):
        raise UsageError(
            f"{request.name} did not return a model",
            got=type(made).__name__,
            expected="a torch.nn.Module, or a pair (module, {argument name: tensor})",
        )
    module = module.eval()
    inputs = accepted_inputs(module, [describe(k, v) for k, v in example.items()], request.inputs)
    weights = "as the factory made them"
    if request.weights is not None:
        weights = load_weights(module, inputs, request.weights, request.name)
    return LoadedSource(
        name=request.name.rsplit(":", 1)[-1],
        description=request.name,
        module=module,
        inputs=inputs,
        weights=weights,
    )


def describe(name: str, value: Any) -> ExampleInput:
    """An example tensor as a description: integers are drawn from the range that the example spans."""
    if not isinstance(value, torch.Tensor):
        raise UsageError(
            f"example input {name!r} is not a tensor",
            got=type(value).__name__,
            expected="a torch tensor with the batch as its first dimension",
            next_step="fix other arguments with --source-arg, or wrap the model",
        )
    dtype = str(value.dtype).removeprefix("torch.")
    low = high = 0
    if not value.dtype.is_floating_point and value.numel():
        low, high = int(value.min()), int(value.max()) + 1
    return ExampleInput(name, tuple(value.shape), dtype, low=low, high=max(high, 1))


def _find(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"the module {module_name} cannot be imported",
            got=str(error),
            expected="package.module:factory, importable from here",
            next_step="run from the folder that holds it, or set PYTHONPATH",
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UsageError(f"{module_name} has no {attribute!r}", got=attribute, expected=nearest(attribute, names))
    return found
