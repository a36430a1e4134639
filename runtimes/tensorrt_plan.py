"""What a serialized engine (a plan) says about itself before TensorRT reads it."""

from __future__ import annotations

from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.runtimes.cuda_device import DeviceMemoryError

_TAG = b"ftrt"
_HEADER = 28
"""Bytes that `trtexec --getPlanVersionOnly` reads: the tag, the format (0), and the version in the last four."""

Version = tuple[int, int, int, int]


def is_plan(content: bytes | memoryview) -> bool:
    return bytes(content[:4]) == _TAG


def plan_version(content: bytes | memoryview) -> Version | None:
    """The TensorRT version that wrote the plan; None for another format than the one of TensorRT 8.6 to 11."""
    header = bytes(content[:_HEADER])
    if len(header) < _HEADER or not is_plan(header) or int.from_bytes(header[4:8], "little") != 0:
        return None
    major, minor, patch, build = header[24:28]
    return major, minor, patch, build


def unusable(
    plan: bytes | memoryview, reason: AttnDeployError, installed: str, *, where: str | None = None
) -> AttnDeployError:
    """Why an engine could not be opened: TensorRT itself only gives none. Memory that ran out stays that error."""
    if isinstance(reason, DeviceMemoryError):
        return reason
    version = plan_version(plan)
    rebuild = "open the bundle's ONNX variant instead: its engine is built on this device"
    if version is None:
        return AttnDeployError(
            "this is no TensorRT engine", where=where, got=reason.got, expected="a serialized engine", next_step=rebuild
        )
    built = ".".join(map(str, version))
    if version[:3] != tuple(_numbers(installed)[:3]):
        return UnavailableError(
            "the engine was built by another TensorRT",
            where=where,
            got=f"an engine of TensorRT {built}",
            expected=f"one of TensorRT {installed}, which is installed",
            next_step=f"pip install 'tensorrt=={version[0]}.{version[1]}.{version[2]}.*', or {rebuild}",
        )
    return UnavailableError(
        "the engine was not built for this GPU",
        where=where,
        got=reason.got,
        expected="an engine of this GPU's model, or one built with hardware_compatible",
        next_step=rebuild,
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
