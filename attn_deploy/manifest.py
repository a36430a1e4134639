"""manifest.json: what a bundle holds and how an application feeds it."""

from __future__ import annotations

import msgspec

from attn_deploy.inputs import ExampleInput
from attn_deploy.preprocess import Preprocess
from attn_deploy.session import DimBounds, TensorSpec

SCHEMA_VERSION = 1


class FileEntry(msgspec.Struct, frozen=True):
    sha256: str
    size: int


class Variant(msgspec.Struct, frozen=True):
    """One lowered model. `files` are bundle-relative, the model first, then what it refers to (external data).

    `library` names the native library the model's custom operators need, None for plain ONNX. `options` are what the
    session is opened with.
    """

    target: str
    precision: str
    files: tuple[str, ...]
    library: str | None = None
    options: dict[str, str] = {}


class Graph(msgspec.Struct, frozen=True):
    """One entry point: its inputs and outputs with named dimensions, and the variants that compute it by id.

    `examples` say how inputs to try it with are made: `validate` and `bench` need no source for that.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimBounds]
    variants: dict[str, Variant]
    examples: tuple[ExampleInput, ...] = ()


class Manifest(msgspec.Struct, frozen=True):
    schema_version: int
    name: str
    source: str
    graphs: dict[str, Graph]
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    chosen: dict[str, str]
    requirements: dict[str, str]
    files: dict[str, FileEntry]
