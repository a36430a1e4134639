"""`timm:NAME`: a model of the timm package. Nothing is downloaded unless --source-arg pretrained=true says so."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from attn_deploy.errors import UsageError
from attn_deploy.export.sources.base import (
    LoadedSource,
    SourceRequest,
    accepted_inputs,
    forward_names,
    load_state,
    load_weights,
    require_package,
    runs_on,
    with_inputs,
)
from attn_deploy.inputs import ExampleInput
from attn_deploy.preprocess import Preprocess
from attn_deploy.target import nearest


def load(request: SourceRequest) -> LoadedSource:
    require_package("timm", "'attn-deploy[export]'")
    import timm

    if request.name not in timm.list_models() and not timm.is_model(request.name.split(".")[0]):
        raise UsageError("timm has no such model", got=request.name, expected=nearest(request.name, timm.list_models()))
    module = _create(request)
    data = timm.data.resolve_data_config({}, model=module)
    arguments = request.arguments or {}
    if "img_size" in arguments:
        size = arguments["img_size"]
        data["input_size"] = (data["input_size"][0], *((size, size) if isinstance(size, int) else size))
    name = forward_names(module)[0]
    inputs = accepted_inputs(module, [ExampleInput(name, (1, *data["input_size"]))], request.inputs)
    size = _size(inputs, name)
    if size != data["input_size"][1:] and _is_made_for_a_size(module, request) and not runs_on(module, inputs):
        module = _create(request, img_size=size)
    weights = f"timm pretrained {request.name}" if _is_pretrained(request) else None
    return LoadedSource(
        name=request.name,
        description=f"timm:{request.name}",
        module=module,
        inputs=inputs,
        weights=weights or load_weights(module, inputs, request.weights, request.name, _resampled),
        preprocess=_preprocess(name, size, data),
        labels=_labels(module.num_classes),
        resize=partial(_resize, request, data),
    )


def _create(request: SourceRequest, **more: Any) -> nn.Module:
    import timm

    arguments = {**(request.arguments or {}), **more, "pretrained": _is_pretrained(request)}
    try:
        return timm.create_model(request.name, **arguments).eval()
    except Exception as error:
        raise UsageError(
            f"timm could not build {request.name}",
            got=f"{type(error).__name__}: {error}",
            next_step="check --source-arg against timm.create_model" + ("; or another --input" if more else ""),
        ) from error


def _is_pretrained(request: SourceRequest) -> bool:
    return bool((request.arguments or {}).get("pretrained", False))


def _size(inputs: Sequence[ExampleInput], name: str) -> tuple[int, ...]:
    """(height, width) of the images."""
    return next(i.shape[2:] for i in inputs if i.name == name)


def _is_made_for_a_size(module: nn.Module, request: SourceRequest) -> bool:
    """Whether another image size is said when the model is built: Swin's masks, ViT's positions, MaxViT's windows."""
    parameters = inspect.signature(type(module).__init__).parameters
    return "img_size" in parameters and "img_size" not in (request.arguments or {})


def _resize(
    request: SourceRequest, data: Mapping[str, Any], first: LoadedSource, given: Sequence[ExampleInput]
) -> LoadedSource:
    """The same module where it takes the size; else one that is built for it, with the weights resampled by timm."""
    assert isinstance(first.module, nn.Module)
    source = with_inputs(first, given)
    name = source.inputs[0].name
    size = _size(source.inputs, name)
    if not runs_on(first.module, source.inputs) and _is_made_for_a_size(first.module, request):
        if _is_pretrained(request) or not (request.weights or "init").startswith("init"):
            return load(replace(request, inputs=given))  # resampled from the file, not from the first resolution
        module = _create(request, img_size=size)
        where = f"{first.inputs[0].describe()}, resampled by timm"
        load_state(module, first.module.state_dict(), where, request.name, _resampled)
        source = replace(source, module=module)
    return replace(source, preprocess=_preprocess(name, size, data))


def _resampled(module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Position embeddings and bias tables of another image size, resampled by the model's own filter of checkpoints."""
    filter_checkpoint = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if filter_checkpoint is None:
        return state
    own, found = module.state_dict(), filter_checkpoint(dict(state), module)
    return {k: found.get(k, v) if k in own and own[k].shape != v.shape else v for k, v in state.items()}


def _preprocess(name: str, size: tuple[int, ...], data: Mapping[str, Any]) -> Preprocess:
    """timm's evaluation transform: short side to size / crop_pct, then a centre crop (timm.data.transforms_factory)."""
    squash = data["crop_mode"] == "squash" or size[0] != size[1]
    scaled = tuple(int(s / data["crop_pct"]) for s in size)
    return Preprocess(
        input=name,
        crop=(size[0], size[1]),
        resize=(scaled[0], scaled[1]) if squash else scaled[0],
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _labels(num_classes: int) -> tuple[str, ...] | None:
    """ImageNet-1k's names where the head has its size; other heads have no names of their own in timm."""
    if num_classes != 1000:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(i) for i in range(num_classes))
