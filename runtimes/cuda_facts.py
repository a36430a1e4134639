"""What a GPU is and does at this moment, for receipts: a latency means little without the clocks it was taken at."""

from __future__ import annotations

from typing import Any

import msgspec

_REASONS = {
    "SwPowerCap": "power limit",
    "HwPowerBrakeSlowdown": "external power brake",
    "HwThermalSlowdown": "too hot (hardware)",
    "SwThermalSlowdown": "too hot (driver)",
    "HwSlowdown": "hardware slowdown",
    "ApplicationsClocksSetting": "clocks set by a user",
    "SyncBoost": "bound to another GPU's clocks",
    "DisplayClockSetting": "display clocks",
    "GpuIdle": "idle",
}


class DeviceFacts(msgspec.Struct, frozen=True):
    """Of one GPU; what comes from NVML is None without nvidia-ml-py, or where the GPU does not tell."""

    name: str
    compute_capability: str
    memory_mb: int
    cuda_driver: str
    driver: str | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    throttled_by: tuple[str, ...] = ()


def device_facts(device_id: int = 0) -> DeviceFacts:
    """Facts of a GPU that `cuda_device.availability` has found. Raises nothing more for what NVML cannot tell."""
    from cuda.bindings import driver
    from cuda.core import Device

    device = Device(device_id)
    device.set_current()
    capability = device.compute_capability
    _, _, total = driver.cuMemGetInfo()
    _, version = driver.cuDriverGetVersion()
    return DeviceFacts(
        name=device.name,
        compute_capability=f"{capability.major}.{capability.minor}",
        memory_mb=total // 2**20,
        cuda_driver=f"{version // 1000}.{version % 1000 // 10}",
        **_from_nvml(device),
    )


def _from_nvml(device: Any) -> dict[str, Any]:
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        return _moment(pynvml, _handle(pynvml, device.uuid))
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, uuid: str) -> Any:
    """By the UUID: NVML counts every GPU of the machine, CUDA those of CUDA_VISIBLE_DEVICES."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _moment(nvml: Any, handle: Any) -> dict[str, Any]:
    def told(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nvml.NVMLError:
            return None

    power = told(nvml.nvmlDeviceGetPowerUsage, handle)
    limit = told(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    reasons = told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    text = told(nvml.nvmlSystemGetDriverVersion)
    return {
        "driver": text.decode() if isinstance(text, bytes) else text,
        "sm_clock_mhz": told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": told(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "power_w": None if power is None else power / 1000,
        "power_limit_w": None if limit is None else limit / 1000,
        "temperature_c": told(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "throttled_by": tuple(
            words for name, words in _REASONS.items() if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
        ),
    }
