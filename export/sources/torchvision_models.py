"""`torchvision:NAME`: a model of torchvision. Nothing is downloaded unless --source-arg pretrained=true says so."""

from __future__ import annotations

from typing import Any

from attn_deploy.errors import UsageError
from attn_deploy.export.sources.base import (
    LoadedSource,
    SourceRequest,
    accepted_inputs,
    forward_names,
    load_weights,
    require_package,
)
from attn_deploy.inputs import ExampleInput
from attn_deploy.preprocess import Preprocess
from attn_deploy.target import nearest


def load(request: SourceRequest) -> LoadedSource:
    require_package("torchvision", "torchvision")
    from torchvision import models

    arguments = dict(request.arguments or {})
    if request.name not in models.list_models():
        raise UsageError(
            "torchvision has no such model", got=request.name, expected=nearest(request.name, models.list_models())
        )
    pretrained = bool(arguments.pop("pretrained", False))
    default = getattr(models.get_model_weights(request.name), "DEFAULT", None)
    try:
        module = models.get_model(request.name, weights=default if pretrained else None, **arguments).eval()
    except Exception as error:
        raise UsageError(
            f"torchvision could not build {request.name}", got=f"{type(error).__name__}: {error}"
        ) from error
    transform = default.transforms() if default is not None else None
    crop = _pair(getattr(transform, "crop_size", None) or 224)
    name = forward_names(module)[0]
    inputs = accepted_inputs(module, [ExampleInput(name, (1, 3, *crop))], request.inputs)
    labels = tuple(default.meta.get("categories", ())) if default is not None else ()
    return LoadedSource(
        name=request.name,
        description=f"torchvision:{request.name}",
        module=module,
        inputs=inputs,
        weights=f"torchvision {default}" if pretrained else load_weights(module, inputs, request.weights, request.name),
        preprocess=_preprocess(name, inputs[0].shape, transform),
        labels=labels if labels and "num_classes" not in arguments else None,
    )


def _pair(size: Any) -> tuple[int, int]:
    values = list(size) if isinstance(size, (list, tuple)) else [size]
    return (values[0], values[-1])


def _preprocess(name: str, shape: tuple[int, ...], transform: Any) -> Preprocess | None:
    if transform is None or not hasattr(transform, "crop_size"):
        return None
    resize = transform.resize_size
    return Preprocess(
        input=name,
        crop=(shape[2], shape[3]),
        resize=resize[0] if isinstance(resize, (list, tuple)) and len(resize) == 1 else resize,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
