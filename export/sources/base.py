"""What a source gives, and the helpers that every kind of source shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from attn_deploy.errors import UnavailableError, UsageError
from attn_deploy.export.initializer import initialize
from attn_deploy.inputs import ExampleInput, make_feeds, override
from attn_deploy.preprocess import Preprocess, at_size

PACKAGE_DEFAULTS = "init:package"
"""Weights as the package makes them: enough where only time is measured, worthless for parity."""


@dataclass(frozen=True)
class LoadedSource:
    """A model in evaluation mode with what is needed to feed it. `weights` says where its numbers come from, `resize`
    how it is had for inputs of other sizes where that takes more than feeding them."""

    name: str
    description: str
    module: nn.Module | ExportedProgram
    inputs: tuple[ExampleInput, ...]
    weights: str
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    resize: Callable[[LoadedSource, Sequence[ExampleInput]], LoadedSource] | None = None

    def at(self, given: Sequence[ExampleInput]) -> LoadedSource:
        """The same model with the same weights for inputs of other sizes."""
        return with_inputs(self, given) if self.resize is None else self.resize(self, given)


@dataclass(frozen=True)
class SourceRequest:
    """What the user said besides the source's name."""

    name: str
    weights: str | None = None
    arguments: Mapping[str, Any] | None = None
    inputs: Sequence[ExampleInput] = ()


def require_package(name: str, extra: str) -> None:
    """Raises UnavailableError with the command that installs what is missing."""
    try:
        __import__(name)
    except ImportError as error:
        raise UnavailableError(
            f"{name} is not installed", got=str(error), expected=f"the {name} package", next_step=f"pip install {extra}"
        ) from error


def forward_names(module: nn.Module) -> list[str]:
    """Names of forward's arguments that have no default. Raises UsageError for *args, which have no names."""
    names = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise UsageError(
                "the model's forward takes *args, which have no names",
                where=f"{type(module).__name__}.forward",
                expected="named arguments",
                next_step="wrap the model in a module whose forward names its inputs",
            )
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return names


def accepted_inputs(
    module: nn.Module, inputs: Sequence[ExampleInput], given: Sequence[ExampleInput]
) -> tuple[ExampleInput, ...]:
    """The source's inputs with the user's on top; every name must be an argument of forward."""
    merged = override(inputs, given)
    parameters = inspect.signature(module.forward).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [i.name for i in merged if i.name not in parameters]
    if unknown and not any_keyword:
        raise UsageError(
            f"the model's forward has no argument {unknown[0]!r}",
            got=", ".join(i.name for i in merged),
            expected=", ".join(parameters),
        )
    missing = [name for name in forward_names(module) if name not in {i.name for i in merged}]
    if missing:
        raise UsageError(
            "the model's inputs are not known",
            got=", ".join(i.name for i in merged) or "no inputs",
            expected=f"a shape for {', '.join(missing)}",
            next_step="add " + " ".join(f"--input {name}=1x3x224x224" for name in missing) + ", with the real shapes",
        )
    return merged


def with_inputs(source: LoadedSource, given: Sequence[ExampleInput]) -> LoadedSource:
    """The module as it is, for inputs of other sizes; images are prepared for theirs."""
    assert isinstance(source.module, nn.Module)  # a saved program takes no inputs from the user
    inputs = accepted_inputs(source.module, source.inputs, given)
    config = source.preprocess
    shapes = {i.name: i.shape for i in inputs}
    if config is not None and len(shapes[config.input]) == 4:
        config = at_size(config, *shapes[config.input][2:])
    return replace(source, inputs=inputs, preprocess=config)


def runs_on(module: nn.Module, inputs: Sequence[ExampleInput]) -> bool:
    """Whether the module takes inputs of these sizes."""
    feeds = {name: torch.from_numpy(array) for name, array in make_feeds(inputs, batch=None, seed=0).items()}
    try:
        with torch.no_grad():
            module(**feeds)
    except Exception:  # whatever a module raises on an input that does not fit it
        return False
    finally:
        module.train().eval()  # LeViT keeps tables made from parameters, which may be set after this
    return True


Fit = Callable[[nn.Module, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""A state_dict resampled for a module of another input size."""


def load_weights(
    module: nn.Module, inputs: Sequence[ExampleInput], weights: str | None, name: str, fit: Fit | None = None
) -> str:
    """Puts weights into `module` in place and says which. Without a file: the project's own initializer.

    `weights` is a safetensors file, a torch file (read with weights_only), `init:SEED`, or PACKAGE_DEFAULTS. `fit` is
    tried on a file whose shapes differ from the module's.
    """
    module.eval()
    if weights == PACKAGE_DEFAULTS:
        return "the package's default initialization"
    if weights is None or weights.startswith("init"):
        seed = _seed(weights)
        feeds = {k: torch.from_numpy(v) for k, v in make_feeds(inputs, batch=2, seed=seed).items()}
        initialize(module, feeds, seed=seed)
        return f"initializer, seed {seed} (no trained weights)"
    path = Path(weights)
    if not path.is_file():
        raise UsageError("the weights file does not exist", got=weights, expected="a .safetensors or .pt file")
    load_state(module, _read_state(path), str(path), name, fit)
    return path.name


def _seed(weights: str | None) -> int:
    text = (weights or "init:0").partition(":")[2] or "0"
    if not text.isdigit():
        raise UsageError(
            "the initializer's seed is not a number", got=weights, expected="init:SEED, for example init:0"
        )
    return int(text)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            "the weights file cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="safetensors, or a state_dict saved by torch.save (read with weights_only, without pickled code)",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state


def load_state(
    module: nn.Module, state: Mapping[str, torch.Tensor], where: str, name: str, fit: Fit | None = None
) -> None:
    """Puts a state_dict into `module`, resampled by `fit` where shapes differ. Raises UsageError: it does not fit."""
    own = module.state_dict()
    if fit is not None and any(own[k].shape != state[k].shape for k in own.keys() & state.keys()):
        state = fit(module, state)
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unexpected or wrong:
        got = [f"unexpected {_few(unexpected)}"] if unexpected else []
        got += [f"{k} {list(state[k].shape)}" for k in sorted(wrong)[:4]]
        expected = [f"missing {_few(missing)}"] if missing else []
        expected += [f"{k} {list(own[k].shape)}" for k in sorted(wrong)[:4]]
        raise UsageError(
            f"the weights do not fit {name}",
            where=where,
            got="; ".join(got) or "a file without them",
            expected="; ".join(expected) or "only the model's own keys",
            next_step="check the model's name and --source-arg (num_classes, img_size) against the weights",
        )
    module.load_state_dict(dict(state))


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
