"""A graph whose matrix products are of eight bits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def quantise(graph: Path, path: Path) -> Path:
    """Write a float32 graph with its products by weights (MatMul, Gemm) in int8.

    Weights have a scale for each output channel, activations one that each inference takes from their own range, so
    that no images are needed to calibrate. Convolutions stay in float32: onnxruntime advises ranges of calibration
    images for those, and with them the boxes of the trained RT-DETR move further.

    Args:
        graph: that :func:`~dfine_plugin.export.export_onnx` wrote, in float32.
        path: to write.

    Returns:
        ``path``.
    """
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return path
