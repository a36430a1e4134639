"""Network -> serialized engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorrt.faults import told
from tensorrt.names import BuilderFlag, ErrorCodeTRT, MemoryPoolType
from tensorrt.network import Network
from tensorrt.plan import plan

Profile = dict[str, list[list[int]]]


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: Profile = {}

    def set_shape(self, name: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.shapes[name] = [list(min), list(opt), list(max)]


class BuilderConfig:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[Profile] = []
        self.limits: dict[MemoryPoolType, int] = {}
        self.timing: TimingCache | None = None
        self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.limits[pool] = size

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        return None if content.startswith(b"damaged") else TimingCache(content)

    def set_timing_cache(self, timing: TimingCache, ignore_mismatch: bool) -> bool:
        self.timing = timing
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timing


built: list[BuilderConfig] = []
"""Every build that was done in this process."""


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.error_recorder: Any = None

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        graph = network.graph
        assert graph is not None, "nothing was parsed"
        about = told(graph.model)
        built.append(config)
        if "log" in about:
            with Path(about["log"]).open("a") as log:
                log.write(f"{len(graph.model.graph.node)} layers\n")
        config.progress_monitor.phase_start("building", None, 4)
        for step in range(4):
            if not config.progress_monitor.step_complete("building", step):
                return None
        config.progress_monitor.phase_finish("building")
        failure = about.get("fails_to_build")
        if failure:
            self.error_recorder.report_error(ErrorCodeTRT[failure], "[made.cpp::build::1] a reason")
            return None
        if about.get("widens"):
            graph = graph.widened()
        capturable = about.get("capturable", True)
        return plan(graph.model.SerializeToString(), profiles=config.profiles, capturable=capturable)
