"""What the benchmarks of cost share: a clock that waits for the device, and the device's name."""

from __future__ import annotations

import time

import torch

from dfine_plugin.benchmarks.reporting import cpu_model


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
