"""`timm:NAME`: a model of the timm package. Nothing is downloaded unless --source-arg pretrained=true says so."""

from __future__ import annotations

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
    require_package("timm", "'attn-deploy[export]'")
    import timm

    arguments = dict(request.arguments or {})
    if request.name not in timm.list_models() and not timm.is_model(request.name.split(".")[0]):
        raise UsageError("timm has no such model", got=request.name, expected=nearest(request.name, timm.list_models()))
    pretrained = bool(arguments.pop("pretrained", False))
    try:
        module = timm.create_model(request.name, pretrained=pretrained, **arguments).eval()
    except Exception as error:
        raise UsageError(
            f"timm could not build {request.name}",
            got=f"{type(error).__name__}: {error}",
            next_step="check --source-arg against timm.create_model",
        ) from error
    data = timm.data.resolve_data_config({}, model=module)
    if "img_size" in arguments:
        size = arguments["img_size"]
        data["input_size"] = (data["input_size"][0], *((size, size) if isinstance(size, int) else size))
    name = forward_names(module)[0]
    inputs = accepted_inputs(module, [ExampleInput(name, (1, *data["input_size"]))], request.inputs)
    size = next(i.shape[2:] for i in inputs if i.name == name)
    weights = f"timm pretrained {request.name}" if pretrained else None
    return LoadedSource(
        name=request.name,
        description=f"timm:{request.name}",
        module=module,
        inputs=inputs,
        weights=weights or load_weights(module, inputs, request.weights, request.name),
        preprocess=_preprocess(name, (size[0], size[1]), data),
        labels=_labels(module.num_classes),
    )


def _preprocess(name: str, size: tuple[int, int], data: dict) -> Preprocess:  # type: ignore[type-arg]
    """timm's evaluation transform: short side to size / crop_pct, then a centre crop (timm.data.transforms_factory)."""
    squash = data["crop_mode"] == "squash" or size[0] != size[1]
    scaled = tuple(int(s / data["crop_pct"]) for s in size)
    return Preprocess(
        input=name,
        crop=size,
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
