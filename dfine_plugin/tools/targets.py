"""What engines are built by, and for: TensorRT's packages, and GPUs by name."""

import re

BACKENDS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Package to module. TensorRT-RTX builds for any device on any machine; TensorRT for the device at hand."""

GPUS = {
    "T4": "sm75", "RTX 2080": "sm75", "GTX 1660": "sm75",
    "A100": "sm80", "A30": "sm80",
    "A10": "sm86", "A40": "sm86", "A6000": "sm86", "RTX 3060": "sm86", "RTX 3080": "sm86", "RTX 3090": "sm86",
    "Orin": "sm87",
    "L4": "sm89", "L40": "sm89", "L40S": "sm89", "RTX 4060": "sm89", "RTX 4080": "sm89", "RTX 4090": "sm89",
    "H100": "sm90", "H200": "sm90", "GH200": "sm90",
    "B200": "sm100", "GB200": "sm100",
    "RTX 5080": "sm120", "RTX 5090": "sm120",
}  # fmt: skip
"""Compute capabilities, as NVIDIA lists them (https://developer.nvidia.com/cuda-gpus)."""


def compute_capability(target: str) -> str:
    """The compute capability that ``sm75``, ``7.5`` or a GPU's name such as ``T4`` stands for, as ``sm75``.

    Raises:
        ValueError: none of these; names the GPUs that are known.
    """
    text = _plain(target)
    if re.fullmatch(r"sm\d+|\d+\.\d", text):
        return f"sm{text.removeprefix('sm').replace('.', '')}"
    for name, capability in GPUS.items():
        if text == _plain(name):
            return capability
    raise ValueError(
        f"target {target!r} is no compute capability such as sm75, and none of the GPUs {', '.join(GPUS)}; those of "
        "others are listed at https://developer.nvidia.com/cuda-gpus"
    )


def _plain(name: str) -> str:
    """A GPU's name without its brand: ``NVIDIA GeForce RTX 4090`` is ``4090``."""
    return re.sub(r"nvidia|geforce|tesla|rtx|gtx|[\s_-]", "", name.lower())
