"""What latency is measured on, by name."""

from dfine_plugin.targets import BACKENDS as ENGINE_BACKENDS

BACKENDS = ("torch", "torch-compile", "torch-cudagraph", "onnxruntime", *ENGINE_BACKENDS)
CPU_BACKENDS = ("torch", "torch-compile", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "bf16")
