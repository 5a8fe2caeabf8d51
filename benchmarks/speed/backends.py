"""What latency is measured on, by name."""

from dfine_plugin.tools.targets import BACKENDS as ENGINE_BACKENDS

LOWERED = {"onnxruntime-int8": "int8", "openvino": "fp32", "openvino-bf16": "bf16"}
"""Backends for the CPU that are given a float32 graph, and the precision that they compute in."""
BACKENDS = ("torch", "torch-compile", "torch-cudagraph", "onnxruntime", *LOWERED, *ENGINE_BACKENDS)
CPU_BACKENDS = ("torch", "torch-compile", "onnxruntime", *LOWERED)
PRECISIONS = ("fp32", "fp16", "bf16")
