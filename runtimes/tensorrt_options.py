"""How a TensorRT engine is built and run, as options of a variant; which optimization profile runs which shapes.

Options are text, as they stand in a bundle's manifest:

    profile:DIM            ranges of a dynamic dimension, `min,opt,max` each, joined by `;`: `1,1,1;2,32,128`
    optimization_level     0 to 5: how long the builder searches (default 3, TensorRT's own)
    workspace_mb           bound of the memory that one layer may use besides its tensors (default 4096)
    version_compatible     1: the engine runs on later TensorRT of the same major too
    hardware_compatible    none (default), ampere_plus, same_compute_capability: the engine runs on other GPUs too
    tf32                   1: FP32 products may be rounded to 10-bit mantissas (default 0: FP32 means FP32)
    cuda_graph             0: every call launches kernel by kernel (default 1)
    device_id              which GPU (default 0)

An engine has one optimization profile for each combination of ranges. TensorRT picks the kernels that are fastest at a
profile's `opt`, so a range of its own for batch 1 keeps latency at batch 1 what it is without a dynamic batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from attn_deploy.errors import FeedError, UsageError
from attn_deploy.session import BATCH, SEQUENCE, DimBounds, TensorSpec
from attn_deploy.target import nearest

PROFILE = "profile:"
UNBOUNDED_MAX = {BATCH: 128, SEQUENCE: 512}
"""Where a profile ends when the bundle's dimension has no bound. A larger batch is split into parts of this size."""

_OTHER_MAX = 1024
_TYPICAL = {BATCH: 32, SEQUENCE: 128}
_MAX_PROFILES = 8
"""Each profile is optimized by itself: build time grows with their number."""

HARDWARE = ("none", "ampere_plus", "same_compute_capability")
DEFAULTS = {
    "optimization_level": "3", "workspace_mb": "4096", "version_compatible": "0", "hardware_compatible": "none",
    "tf32": "0", "cuda_graph": "1", "device_id": "0",
}  # fmt: skip


class Range(NamedTuple):
    """Sizes of one dynamic dimension in one optimization profile, inclusive."""

    min: int
    opt: int
    max: int

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.min <= size <= self.max


Profile = Mapping[str, Range]
"""Dimension -> its range."""


@dataclass(frozen=True)
class Options:
    """The options above, parsed."""

    ranges: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    optimization_level: int = 3
    workspace_mb: int = 4096
    version_compatible: bool = False
    hardware_compatible: str = "none"
    tf32: bool = False
    cuda_graph: bool = True
    device_id: int = 0


def parse(options: Mapping[str, str]) -> Options:
    """Raises UsageError: an unknown option (a newer bundle may count on it), or a value out of its range."""
    known = {k: v for k, v in options.items() if not k.startswith(PROFILE)}
    for name in known.keys() - DEFAULTS.keys():
        raise UsageError("unknown TensorRT option", got=name, expected=nearest(name, [*DEFAULTS, PROFILE + BATCH]))
    values = DEFAULTS | known
    if values["hardware_compatible"] not in HARDWARE:
        raise _wrong("hardware_compatible", values["hardware_compatible"], ", ".join(HARDWARE))
    return Options(
        ranges={k.removeprefix(PROFILE): _ranges(k, v) for k, v in options.items() if k.startswith(PROFILE)},
        optimization_level=_integer("optimization_level", values, 0, 5),
        workspace_mb=_integer("workspace_mb", values, 1, 1 << 30),
        version_compatible=_flag("version_compatible", values),
        hardware_compatible=values["hardware_compatible"],
        tf32=_flag("tf32", values),
        cuda_graph=_flag("cuda_graph", values),
        device_id=_integer("device_id", values, 0, 1 << 10),
    )


def _wrong(name: str, got: str, expected: str) -> UsageError:
    return UsageError(f"the TensorRT option {name!r} has no such value", got=got, expected=expected)


def _integer(name: str, values: Mapping[str, str], low: int, high: int) -> int:
    text = values[name]
    if not (text.isascii() and text.isdigit()) or not low <= int(text) <= high:
        raise _wrong(name, text, f"a whole number from {low} to {high}")
    return int(text)


def _flag(name: str, values: Mapping[str, str]) -> bool:
    if values[name] not in ("0", "1"):
        raise _wrong(name, values[name], "0 or 1")
    return values[name] == "1"


def _ranges(name: str, text: str) -> tuple[Range, ...]:
    expected = "min,opt,max with 1 <= min <= opt <= max, several joined by `;`"
    ranges = []
    for part in text.split(";"):
        numbers = [n.strip() for n in part.split(",")]
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() for n in numbers):
            raise _wrong(name, text, expected)
        found = Range(*(int(n) for n in numbers))
        if not 1 <= found.min <= found.opt <= found.max:
            raise _wrong(name, text, expected)
        ranges.append(found)
    return tuple(ranges)


def profile_options(dims: Mapping[str, DimBounds]) -> dict[str, str]:
    """The `profile:` options for a bundle's dynamic dimensions: what a lowering writes into its variant."""
    return {
        PROFILE + dim: ";".join(",".join(map(str, r)) for r in ranges_within(dim, bounds))
        for dim, bounds in dims.items()
    }


def ranges_within(dim: str, bounds: DimBounds) -> tuple[Range, ...]:
    """Ranges that cover the bounds: for the batch one of exactly 1, where it may be 1, and one for all above."""
    low = max(1, bounds.min)
    high = max(low, bounds.max if bounds.max is not None else UNBOUNDED_MAX.get(dim, _OTHER_MAX))
    typical = _TYPICAL.get(dim, 128)
    if dim == BATCH and low == 1 < high:
        return Range(1, 1, 1), Range(2, min(max(2, typical), high), high)
    return (Range(low, min(max(low, typical), high), high),)


def profiles(options: Options, dims: Sequence[str]) -> tuple[dict[str, Range], ...]:
    """Every combination of the ranges of these dimensions; one without any range when there are none.

    A dimension without an option gets the ranges of an unbounded one. Raises UsageError for more than 8 profiles.
    """
    choices = [options.ranges.get(dim) or ranges_within(dim, DimBounds()) for dim in dims]
    count = math.prod(len(c) for c in choices)
    if count > _MAX_PROFILES:
        raise UsageError(
            "too many optimization profiles",
            got=f"{count}, from " + ", ".join(f"{len(c)} x {d}" for d, c in zip(dims, choices, strict=True)),
            expected=f"at most {_MAX_PROFILES}",
            next_step="give fewer ranges to a dimension",
        )
    return tuple(dict(zip(dims, combination, strict=True)) for combination in itertools.product(*choices))


def profiles_of(options: Options, inputs: Sequence[TensorSpec]) -> tuple[dict[str, Range], ...]:
    """The profiles of an engine with these inputs."""
    return profiles(options, dynamic_dims(inputs))


def dynamic_dims(specs: Sequence[TensorSpec]) -> list[str]:
    """Names of the dynamic dimensions, in order of appearance."""
    return list(dict.fromkeys(d for spec in specs for d in spec.shape if isinstance(d, str)))


def shape_within(spec: TensorSpec, profile: Profile, which: str) -> tuple[int, ...]:
    """The shape of an input at a profile's `min`, `opt` or `max`."""
    return tuple(getattr(profile[d], which) if isinstance(d, str) else d for d in spec.shape)


def sizes_of(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Dynamic dimension -> size, from shapes that were checked against the specs."""
    return {
        dim: size
        for spec in specs
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True)
        if isinstance(dim, str)
    }


def choose_profile(candidates: Sequence[Profile], sizes: Mapping[str, int]) -> int | None:
    """The profile that holds these sizes and whose `opt` is nearest, in ratio; None when none holds them."""
    fitting = [
        (sum(abs(math.log(max(size, 1) / profile[dim].opt)) for dim, size in sizes.items()), index)
        for index, profile in enumerate(candidates)
        if all(size in profile[dim] for dim, size in sizes.items())
    ]
    return min(fitting)[1] if fitting else None


def is_batched(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether samples are independent, as far as shapes say: the batch is the first axis of all, and no other one."""
    return all(spec.shape[:1] == (BATCH,) and BATCH not in spec.shape[1:] for spec in [*inputs, *outputs])


def batch_parts(candidates: Sequence[Profile], sizes: Mapping[str, int], *, batched: bool) -> list[int] | None:
    """Sizes of the parts in which a batch runs: one part where a profile holds it; None when it cannot be run.

    A batch beyond every profile is split into parts of the largest batch, the rest last, where samples are independent.
    A rest that is smaller than every profile's `min` makes the parts equal instead.
    """
    if choose_profile(candidates, sizes) is not None:
        return [sizes.get(BATCH, 1)]
    others = {dim: size for dim, size in sizes.items() if dim != BATCH}
    allowed = [p[BATCH] for p in candidates if BATCH in p and all(s in p[d] for d, s in others.items())]
    if not batched or not allowed:
        return None
    batch, largest = sizes[BATCH], max(r.max for r in allowed)
    count = math.ceil(batch / largest)
    uneven = [largest] * (batch // largest) + ([batch % largest] if batch % largest else [])
    even = [batch // count + (i < batch % count) for i in range(count)]
    for parts in (uneven, even):
        if all(any(part in r for r in allowed) for part in parts):
            return parts
    return None


def check_sizes(candidates: Sequence[Profile], sizes: Mapping[str, int], *, batched: bool) -> list[int]:
    """The parts of `batch_parts`. Raises FeedError that names the dimension no profile holds."""
    parts = batch_parts(candidates, sizes, batched=batched)
    if parts is not None:
        return parts
    for dim, size in sizes.items():
        if not any(size in p[dim] for p in candidates):
            change = "split" if dim == BATCH and size > 1 else "pad or shorten"
            raise FeedError(
                f"dimension {dim!r} is outside the engine's optimization profiles",
                got=size,
                expected=", ".join(dict.fromkeys(f"{p[dim].min} to {p[dim].max}" for p in candidates)),
                next_step=f"{change} the {dim}, or export again with --dynamic {dim}=MIN:MAX",
            )
    raise FeedError(
        "no optimization profile of the engine holds these sizes together",
        got=", ".join(f"{dim} {size}" for dim, size in sizes.items()),
        expected="one of: " + "; ".join(_describe(p) for p in candidates),
        next_step="export again with --dynamic",
    )


def _describe(profile: Profile) -> str:
    return ", ".join(f"{dim} {r.min} to {r.max}" for dim, r in profile.items())
