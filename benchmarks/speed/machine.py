"""The machine that a benchmark runs on: what it is, and what its GPU does meanwhile."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dfine_plugin.benchmarks.reporting import cpu_model
from dfine_plugin.benchmarks.timing import device_name

PACKAGES = (
    "dfine-plugin", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino",
    "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt_rtx",
)  # fmt: skip
FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
# the second is what drivers before 535 call the first
REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons that hold clocks down under load; the others say idle, or clocks that were set."""


@dataclass(frozen=True)
class GPUReading:
    """What nvidia-smi says at one moment: clocks in MHz, degrees Celsius, watts; None where the GPU does not tell."""

    driver: str
    sm_clock: float | None
    memory_clock: float | None
    temperature: float | None
    power: float | None
    throttling: tuple[str, ...]


class GPUProbe:
    """Reads a GPU's clocks and what holds them down, by nvidia-smi."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self.readings: list[GPUReading] = []
        self.failure: str | None = None

    def read(self) -> None:
        """Note one reading, or why there is none."""
        for reasons in REASONS_FIELDS:
            query = f"--query-gpu={','.join((*FIELDS, reasons))}"
            command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={self.gpu}"]
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                self.failure = str(error)
                return
            if answer.returncode == 0:
                self.readings.append(parse_reading(answer.stdout))
                return
            self.failure = (answer.stdout + answer.stderr).strip()


def parse_reading(line: str) -> GPUReading:
    """One line of nvidia-smi's CSV with :data:`FIELDS` and the clock event reasons."""
    driver, sm_clock, memory_clock, temperature, power, reasons = (cell.strip() for cell in line.split(","))
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    return GPUReading(
        driver=driver,
        sm_clock=_number(sm_clock),
        memory_clock=_number(memory_clock),
        temperature=_number(temperature),
        power=_number(power),
        throttling=tuple(name for bit, name in THROTTLE_REASONS.items() if bits & bit),
    )


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # "[N/A]" and the like
        return None


def describe_readings(readings: Sequence[GPUReading]) -> str:
    """Driver, ranges of clocks, temperature and power, and how often what held the clocks down."""
    parts = [f"driver {readings[0].driver}"]
    for what, unit, name in (
        ("SM", "MHz", "sm_clock"),
        ("memory", "MHz", "memory_clock"),
        ("", "°C", "temperature"),
        ("", "W", "power"),
    ):
        values = [value for reading in readings if (value := getattr(reading, name)) is not None]
        if values:
            low, high = f"{min(values):.0f}", f"{max(values):.0f}"
            parts.append(f"{what} {low if low == high else f'{low} to {high}'} {unit}".strip())
    found = [reason for reading in readings for reason in reading.throttling]
    counts = [f"{name} in {found.count(name)}" for name in dict.fromkeys(found)]
    parts.append(f"throttled by {', '.join(counts)} of {len(readings)} readings" if counts else "no throttling seen")
    return ", ".join(parts)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, Python and the versions of what is installed of :data:`PACKAGES`."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions,
    }
