"""`file.pt2`: a program saved by torch.export.save. Archives that need unpickling are refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch

from attn_deploy.errors import UsageError
from attn_deploy.export.sources.base import LoadedSource, SourceRequest
from attn_deploy.export.sources.factory import describe


def load(request: SourceRequest) -> LoadedSource:
    path = Path(request.name)
    if not path.is_file():
        raise UsageError("the .pt2 file does not exist", got=request.name, expected="a file saved by torch.export.save")
    for given, flag in (
        (request.weights, "--weights"),
        (request.arguments, "--source-arg"),
        (request.inputs, "--input"),
    ):
        if given:
            raise UsageError(
                f"{flag} does not apply to a .pt2 file",
                got=given,
                expected="nothing: the file holds the weights and the shapes",
                next_step="give the module itself as package.module:factory",
            )
    try:
        _refuse_pickles(path)
        program = torch.export.load(str(path))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            "the .pt2 file cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="a file saved by torch.export.save with this or an earlier torch",
        ) from error
    if program.example_inputs is None:
        raise UsageError("the .pt2 file holds no example inputs", where=str(path), next_step="save it again")
    args, kwargs = program.example_inputs
    names = program.graph_signature.user_inputs
    values = [*args, *kwargs.values()]
    if len(names) != len(values):
        raise UsageError("nested inputs are not supported", where=str(path), expected="tensors as arguments")
    return LoadedSource(
        name=path.stem,
        description=str(path),
        module=program,
        inputs=tuple(describe(str(name), value) for name, value in zip(names, values, strict=True)),
        weights="saved in the .pt2 file",
    )


def _refuse_pickles(path: Path) -> None:
    """torch.export.load unpickles tensor subclasses, opaque constants and example inputs: none of that gets so far."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_config.json"):
                for key, entry in json.loads(archive.read(name)).get("config", {}).items():
                    plain = entry.get("path_name", "").startswith(("weight_", "tensor_"))
                    if entry.get("use_pickle") or not plain:
                        raise UsageError("the .pt2 file holds a pickled value, which is not loaded", where=key)
            elif "/sample_inputs/" in name:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
