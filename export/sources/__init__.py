"""Sources: a string -> a model in evaluation mode, with its inputs, its preprocessing and its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attn_deploy.errors import UsageError
from attn_deploy.export.sources import demo, factory, huggingface, pt2, timm_models, torchvision_models
from attn_deploy.export.sources.base import LoadedSource, SourceRequest
from attn_deploy.inputs import ExampleInput
from attn_deploy.resolutions import about
from attn_deploy.target import nearest

__all__ = ["SOURCES", "LoadedSource", "SourceRequest", "load_resolutions", "load_source"]

SOURCES = {
    "timm": timm_models.load,
    "torchvision": torchvision_models.load,
    "hf": huggingface.load,
    "demo": demo.load,
}
"""Kinds of source by their prefix; `file.pt2` and `package.module:factory` are told by their form."""


def load_source(text: str, request: SourceRequest) -> LoadedSource:
    """`text` as the user wrote it, e.g. `timm:vit_tiny_patch16_224`. Raises UsageError when it names nothing."""
    prefix, colon, rest = text.partition(":")
    if text.endswith(".pt2"):
        return pt2.load(_named(request, text))
    if text == "demo" or (colon and prefix in SOURCES):
        return SOURCES[prefix](_named(request, rest))
    if colon and rest and (prefix.isidentifier() or "." in prefix) and "/" not in prefix:
        try:
            return factory.load(_named(request, text))
        except UsageError as error:
            if error.what.startswith(f"the module {prefix} cannot") and "." not in prefix:
                error.next_step = f"{error.next_step}; as a kind of source: {nearest(prefix, SOURCES)}"
            raise
    raise UsageError(
        "the source is not understood",
        got=text,
        expected="timm:NAME, torchvision:NAME, hf:PATH_OR_ID, package.module:factory, file.pt2 or demo",
        next_step="for example: attn-deploy export timm:vit_tiny_patch16_224 -o vit.attn",
    )


def load_resolutions(
    text: str, request: SourceRequest, resolutions: Mapping[str, Sequence[ExampleInput]]
) -> dict[str, LoadedSource]:
    """The source for each graph of a bundle, by the graph's name: the same model with the same weights.

    The first one is loaded as `load_source` does; the initializer settles its weights on that resolution.
    """
    sources: dict[str, LoadedSource] = {}
    for graph, inputs in resolutions.items():
        with about(graph):
            if sources:
                sources[graph] = next(iter(sources.values())).at(inputs)
            else:
                sources[graph] = load_source(text, replace(request, inputs=inputs))
    return sources


def _named(request: SourceRequest, name: str) -> SourceRequest:
    return replace(request, name=name)
