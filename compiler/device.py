"""What a device can do: the roofs that a roofline divides by.

Figures are what a good kernel reaches, not what the datasheet promises, where we could measure them; the others are
datasheet figures times the share of it that the measured devices reach (0.80 for matrix multiplication, 0.88 for
copies).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

TERA: Final = 1e12
GIGA: Final = 1e9
_OF_PEAK: Final = 0.80
_OF_BANDWIDTH: Final = 0.88


@dataclass(frozen=True)
class Device:
    """The roofs of one device."""

    name: str
    flops: Mapping[torch.dtype, float]
    """Matrix multiplication, per second, by the dtype of the operands."""
    bytes_per_s: float
    launch_us: float
    """What each kernel costs beyond its traffic and arithmetic: launch gap, ramp up, tail."""
    shared_memory: int
    """Bytes of shared memory that one thread block may ask for; 0 on a CPU."""
    l2_bytes: int
    source: str
    """`measured`, `datasheet` or `properties` (read from the driver)."""

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or not self.flops or min(self.flops.values()) <= 0:
            raise ValueError(f"{self.name}: rates must be positive")

    def flops_of(self, dtype: torch.dtype | None) -> float:
        """The rate for a dtype; one that is not listed computes at the rate of float32."""
        return self.flops.get(dtype, self.flops[torch.float32]) if dtype else self.flops[torch.float32]


def _rates(half: float, single: float, double: float, fp8: float | None = None) -> Mapping[torch.dtype, float]:
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: single, torch.float64: double}
    if fp8 is not None:
        rates |= {torch.float8_e4m3fn: fp8, torch.float8_e5m2: fp8}
    return MappingProxyType(rates)


def _datasheet(
    name: str, half: float, single: float, double: float, fp8: float | None, tb_s: float, shared_kib: int, l2_mib: int
) -> Device:
    share = _OF_PEAK * TERA
    rates = _rates(half * share, single * share, double * share, fp8 * share if fp8 else None)
    return Device(name, rates, tb_s * TERA * _OF_BANDWIDTH, 2.0, shared_kib * 1024, l2_mib << 20, "datasheet")


DEVICES: Final[tuple[Device, ...]] = (
    Device(
        "NVIDIA H200",
        _rates(790 * TERA, 51 * TERA, 60 * TERA, 1460 * TERA),
        4.3 * TERA,
        2.0,
        227 * 1024,
        50 << 20,
        "measured",
    ),
    _datasheet("NVIDIA H100 80GB HBM3", 989, 67, 67, 1979, 3.35, 227, 50),
    _datasheet("NVIDIA H100 PCIe", 756, 51, 51, 1513, 2.0, 227, 50),
    _datasheet("NVIDIA B200", 2250, 75, 37, 4500, 8.0, 227, 126),
    _datasheet("NVIDIA A100-SXM4-80GB", 312, 19.5, 19.5, None, 2.04, 163, 40),
    _datasheet("NVIDIA A100-SXM4-40GB", 312, 19.5, 19.5, None, 1.56, 163, 40),
    _datasheet("NVIDIA A10G", 70, 31, 0.49, None, 0.6, 99, 6),
    _datasheet("NVIDIA L4", 121, 30, 0.47, 242, 0.3, 99, 48),
    _datasheet("NVIDIA L40S", 362, 92, 1.4, 733, 0.864, 99, 96),
    _datasheet("NVIDIA GeForce RTX 4090", 165, 83, 1.3, 330, 1.008, 99, 72),
    _datasheet("NVIDIA GeForce RTX 3090", 71, 36, 0.56, None, 0.936, 99, 6),
    _datasheet("Tesla T4", 65, 8.1, 0.25, None, 0.32, 64, 4),
)
H200: Final = DEVICES[0]

_FLOPS_PER_SM_CLOCK: Final = {7: 1024, 8: 1024, 9: 4096, 10: 8192, 12: 1024}
"""bf16 matrix FLOPs of one multiprocessor in one clock, by major compute capability (A100, 8.0, has 2048)."""


def cpu_device(threads: int) -> Device:
    """A generic CPU: 40 GFLOP/s a thread in fp32, 20 GB/s in all; enough to rank rewrites, not to predict a time."""
    single = 40 * GIGA * max(1, threads)
    return Device("CPU", _rates(single, single, single / 2), 20 * GIGA, 3.0, 0, 32 << 20, "datasheet")


def device_of_properties(
    name: str,
    capability: tuple[int, int],
    multiprocessors: int,
    clock_hz: float,
    bytes_per_s: float,
    shared_memory: int,
    l2_bytes: int,
) -> Device:
    """A GPU that is not in the table, from what its driver says."""
    per_clock = 2048 if capability == (8, 0) else _FLOPS_PER_SM_CLOCK.get(capability[0], 1024)
    half = multiprocessors * clock_hz * per_clock * _OF_PEAK
    single = multiprocessors * clock_hz * 256 * _OF_PEAK
    double = single if capability in ((8, 0), (9, 0)) else single / 64
    rates = _rates(half, single, double, 2 * half if capability >= (8, 9) else None)
    return Device(name, rates, bytes_per_s * _OF_BANDWIDTH, 2.0, shared_memory, l2_bytes, "properties")


def device_named(name: str) -> Device | None:
    """The table's entry for a name as the driver gives it, or None."""
    return next((d for d in DEVICES if d.name == name), None)


def device_for(device: torch.device | str) -> Device:
    """The roofs of a torch device.

    A meta device stands for the machine's GPU, and where there is none for an H200, the device the table was measured
    on. Raises ValueError for a device that is neither CPU, CUDA nor meta.
    """
    device = torch.device(device)
    if device.type == "meta":
        return device_for("cuda") if torch.cuda.is_available() else H200
    if device.type == "cpu":
        return cpu_device(torch.get_num_threads())
    if device.type != "cuda":
        raise ValueError(f"no cost model for device {device}; known are cpu, cuda and meta")
    properties = torch.cuda.get_device_properties(device)
    known = device_named(properties.name)
    if known is not None:
        return known
    memory_hz = 1000.0 * getattr(properties, "memory_clock_rate", 5_000_000)
    bus_bytes = getattr(properties, "memory_bus_width", 256) / 8
    return device_of_properties(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        1000.0 * getattr(properties, "clock_rate", 1_500_000),
        2 * memory_hz * bus_bytes,
        getattr(properties, "shared_memory_per_block_optin", 99 * 1024),
        properties.L2_cache_size,
    )
