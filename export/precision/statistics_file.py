"""Statistics as a file (safetensors): arrays by value name, and whose they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import safetensors
from safetensors.numpy import save as to_safetensors

from attn_deploy.errors import StorageError, UsageError
from attn_deploy.export.precision.collected import Statistics, ValueStatistics
from attn_deploy.export.precision.histogram import Histogram

VERSION = "1"
KIND = "attn_deploy.statistics"


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Whole or not at all: a reader never sees half of it. Raises StorageError where it cannot be written."""
    arrays: dict[str, Any] = {}
    scalars: dict[str, tuple[float, float, int | None]] = {}
    for name, value in statistics.values.items():
        histogram = value.histogram
        scalars[name] = (value.low, value.high, None if histogram is None else histogram.exponent)
        if histogram is not None:
            arrays[f"{name}/histogram"] = np.ascontiguousarray(histogram.counts)
        if value.channel_low is not None and value.channel_high is not None:
            arrays[f"{name}/channel_low"] = np.ascontiguousarray(value.channel_low)
            arrays[f"{name}/channel_high"] = np.ascontiguousarray(value.channel_high)
    arrays |= {f"{name}/mean": np.ascontiguousarray(mean) for name, mean in statistics.means.items()}
    metadata = {
        "kind": KIND, "version": VERSION, "model": statistics.model, "seed": str(statistics.seed),
        "samples": str(statistics.samples), "values": msgspec.json.encode(scalars).decode(),
    }  # fmt: skip
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(to_safetensors(arrays, metadata))
        os.replace(beside, path)
    except OSError as error:
        raise StorageError("the statistics cannot be written", where=str(path), got=str(error)) from error


def load_statistics(path: Path, model: ir.Model | None, *, seed: int | None = None) -> Statistics:
    """`model` None: whose they are is known already, as of a bundle's. Raises UsageError for a file that is no such
    file, or of another model or seed (of samples in another order)."""
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (metadata.get("kind"), metadata.get("version")) != (KIND, VERSION):
            raise ValueError(f"it is {metadata.get('kind')} {metadata.get('version')}")
        statistics = _statistics(metadata, arrays)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError, msgspec.MsgspecError) as error:
        raise UsageError(
            "the statistics cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected=f"a file of {KIND} {VERSION}",
            next_step="remove it to collect anew",
        ) from error
    if model is not None:
        _require_same(path, "model", statistics.model, model_hash(model))
    if seed is not None:
        _require_same(path, "seed", statistics.seed, seed)
    return statistics


def _statistics(metadata: dict[str, str], arrays: dict[str, Any]) -> Statistics:
    scalars = msgspec.json.decode(metadata["values"], type=dict[str, tuple[float, float, int | None]])
    values = {
        name: ValueStatistics(
            low,
            high,
            None if exponent is None else Histogram(arrays[f"{name}/histogram"], exponent),
            arrays.get(f"{name}/channel_low"),
            arrays.get(f"{name}/channel_high"),
        )
        for name, (low, high, exponent) in scalars.items()
    }
    means = {name.removesuffix("/mean"): array for name, array in arrays.items() if name.endswith("/mean")}
    return Statistics(metadata["model"], int(metadata["seed"]), int(metadata["samples"]), values, means)


def _require_same(path: Path, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise UsageError(
            f"the statistics are those of another {what}",
            where=str(path),
            got=got,
            expected=expected,
            next_step="give another file, or remove it to collect anew",
        )


def model_hash(model: ir.Model) -> str:
    """sha256 of what a model computes: nodes, how they are connected, attributes, weights; no paths, no stack traces.
    Parts of 2 GiB and more are hashed as well as small ones, since nothing is made a protobuf as a whole."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update("\0".join(map(str, parts)).encode())
        digest.update(b"\1")

    for name, version in sorted(model.opset_imports.items()):
        add("opset", name, version)
    for graph in (model.graph, *(f.graph for _, f in sorted(model.functions.items()))):
        add("inputs", *(v.name for v in graph.inputs), "outputs", *(v.name for v in graph.outputs))
        for node in graph:
            inputs = ("" if v is None else v.name for v in node.inputs)
            add(node.domain, node.op_type, node.name, *inputs, "->", *(v.name for v in node.outputs))
            for key in sorted(node.attributes):
                digest.update(ir.to_proto(node.attributes[key]).SerializeToString(deterministic=True))
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if tensor is not None:
            add("weight", name, tensor.dtype, tensor.shape)
            digest.update(tensor.tobytes())
    return digest.hexdigest()
