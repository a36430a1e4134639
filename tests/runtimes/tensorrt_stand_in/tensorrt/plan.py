"""Serialized engines: TensorRT's header, then profiles, faults and the model."""

from __future__ import annotations

import json
from typing import Any

VERSION = (11, 4, 0, 106)
_HEADER = 28


def plan(model: bytes = b"", version: tuple[int, int, int, int] = VERSION, **about: Any) -> bytes:
    """`about`: profiles, a list of {input: [min, opt, max]}; and faults."""
    text = json.dumps(about).encode()
    return b"ftrt" + bytes(20) + bytes(version) + len(text).to_bytes(4, "little") + text + model


def read_plan(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """(about, model); None for an engine of another version."""
    if tuple(content[24:26]) != VERSION[:2]:
        return None
    begin = _HEADER + 4
    end = begin + int.from_bytes(content[_HEADER:begin], "little")
    return json.loads(content[begin:end]), content[end:]
