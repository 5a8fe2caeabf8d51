"""Which part of a model does not stand its precision."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from torch import Tensor, nn

from ..registry import find_adapter
from .graph import OPSET, exported_model
from .parity import Detections, measure_parity, onnx_detections
from .precision import module_of, to_precision


def find_culprit(
    model: nn.Module, precision: str, images: Sequence[Tensor], expected: Sequence[Detections], threshold: float
) -> tuple[str, float]:
    """The part of a model whose computation in float32 brings boxes back the furthest.

    The parts are what the model, and the modules that contain its decoder, consist of: backbone, encoder, decoder
    layers, FDR head and so on. Each in turn stays in float32 while all else is rounded to the precision.

    Args:
        model: in evaluation mode.
        precision: ``"fp16"`` or ``"bf16"``.
        images: ``(3, H, W)`` each.
        expected: what the model detects on them in float32.
        threshold: see :func:`~dfine_plugin.export.parity.measure_parity`.

    Returns:
        The part's dotted name, and the 99th percentile of the moves in pixels with it in float32.
    """
    height, width = images[0].shape[-2:]
    decoder = f"model.{find_adapter(model).decoder}"
    exported = ir.to_proto(exported_model(model, (height, width), 1, None, OPSET))
    names = {_part(module_of(node), decoder) for node in ir.from_proto(exported).graph}
    # what the modules around the decoder compute themselves is in float32 anyway
    names = {name for name in names if name and not f"{decoder}.".startswith(f"{name}.")}
    without: dict[str, tuple[int, float]] = {}  # for each part in float32: detections lost, moves of the others
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        for name in sorted(names):
            graph = ir.from_proto(exported)
            to_precision(graph, precision, decoder, [name], simulate=True)
            ir.save(graph, path)
            parity = measure_parity(expected, onnx_detections(path, images), threshold)
            without[name] = parity.num_lost, parity.p99_move
    best = min(without, key=lambda name: without[name])
    return best.removeprefix("model."), without[best][1]


def _part(module: str, decoder: str) -> str:
    """The module itself or the one that contains it, next to the path that leads to the decoder."""
    on_the_way = [*decoder.split("."), ""]
    parts = module.split(".")
    depth = next(i for i, part in enumerate(on_the_way) if i == len(parts) or part != parts[i])
    return ".".join(parts[: depth + 1])
