"""`hf:PATH_OR_ID`: a folder with config.json (and weights), or a model id of the Hugging Face hub.

A folder never touches the network. A folder without weights is filled by the project's own initializer, so that an
architecture can be tried from its config alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attn_deploy.errors import UsageError
from attn_deploy.export.sources.base import LoadedSource, SourceRequest, accepted_inputs, load_weights, require_package
from attn_deploy.inputs import ExampleInput
from attn_deploy.preprocess import Preprocess

SEQUENCE_LENGTH = 128


def load(request: SourceRequest) -> LoadedSource:
    require_package("transformers", "transformers")
    import transformers

    folder = Path(request.name)
    local = folder.is_dir()
    if not local and (folder.exists() or request.name.startswith((".", "/", "~"))):
        raise UsageError("no such folder", got=request.name, expected="a folder with config.json, or a model id")
    try:
        config = transformers.AutoConfig.from_pretrained(request.name, local_files_only=local)
    except Exception as error:
        raise UsageError(
            "the model's config cannot be read",
            where=request.name,
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a folder with config.json, or the id of a model that the hub (or the local cache) has",
        ) from error
    for key, value in (request.arguments or {}).items():
        setattr(config, key, value)
    config.use_cache = False
    kind = _model_class(config, transformers)
    has_weights = not local or any(folder.glob("*.safetensors"))
    if has_weights and request.weights is None:
        module = kind.from_pretrained(request.name, config=config, local_files_only=local, use_safetensors=True).eval()
    else:
        module = kind(config).eval()
    inputs = accepted_inputs(module, _inputs(module, config), request.inputs)
    if has_weights and request.weights is None:
        weights = f"safetensors of {request.name}"
    else:
        weights = load_weights(module, inputs, request.weights, request.name)
    id2label = getattr(config, "id2label", None) or {}
    named = "Classification" in kind.__name__ and len(id2label) > 1
    return LoadedSource(
        name=folder.resolve().name if local else request.name.rsplit("/", 1)[-1],
        description=f"hf:{request.name}",
        module=module,
        inputs=inputs,
        weights=weights,
        preprocess=_preprocess(folder, inputs) if local else _hub_preprocess(request.name, inputs),
        labels=tuple(id2label[i] for i in sorted(id2label)) if named else None,
    )


def _model_class(config: Any, transformers: Any) -> Any:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel.from_config(config).__class__


def _inputs(module: Any, config: Any) -> list[ExampleInput]:
    """What the model's main input is, by the name transformers gives it."""
    main = getattr(module, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return [ExampleInput(main, (1, getattr(config, "num_channels", 3), height, width))]
    if main == "input_ids":
        longest = getattr(config, "max_position_embeddings", SEQUENCE_LENGTH) or SEQUENCE_LENGTH
        length = min(SEQUENCE_LENGTH, longest)
        return [
            ExampleInput("input_ids", (1, length), "int64", high=config.vocab_size),
            ExampleInput("attention_mask", (1, length), "int64", mask=True),
        ]
    return []


def _preprocess(folder: Path, inputs: tuple[ExampleInput, ...]) -> Preprocess | None:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    return _from_processor(json.loads(path.read_text()), inputs)


def _hub_preprocess(name: str, inputs: tuple[ExampleInput, ...]) -> Preprocess | None:
    if inputs[0].name != "pixel_values":
        return None
    import transformers

    return _from_processor(transformers.AutoImageProcessor.from_pretrained(name).to_dict(), inputs)


_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _from_processor(config: dict[str, Any], inputs: tuple[ExampleInput, ...]) -> Preprocess | None:
    """transformers' image processor: `size` is a short side or a pair, cropped only when do_center_crop."""
    item = inputs[0]
    if item.name != "pixel_values":
        return None
    size = config.get("size", item.shape[-1])
    crop = (item.shape[2], item.shape[3])
    resize: int | tuple[int, int] = size if isinstance(size, int) else crop
    if isinstance(size, dict):
        resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    elif not config.get("do_center_crop", False):
        resize = crop
    channels = item.shape[1]
    normalized = config.get("do_normalize", True)
    return Preprocess(
        input=item.name,
        crop=crop,
        resize=resize if config.get("do_resize", True) else None,
        interpolation=_RESAMPLING.get(config.get("resample", 2), "bilinear"),
        rescale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        mean=tuple(config.get("image_mean", (0.5,) * channels)) if normalized else (0.0,) * channels,
        std=tuple(config.get("image_std", (0.5,) * channels)) if normalized else (1.0,) * channels,
    )
