"""From a trained model to ONNX and to engines, with a measure of what changed on the way (extra ``export``)."""

from .culprit import find_culprit
from .engine import EngineSummary, build_engine
from .graph import export_onnx
from .parity import Parity, measure_parity
from .static_sizes import static_sizes

__all__ = ["EngineSummary", "Parity", "build_engine", "export_onnx", "find_culprit", "measure_parity", "static_sizes"]
