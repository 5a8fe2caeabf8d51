"""From a trained model to ONNX and to engines, with a measure of what changed on the way (extra ``export``)."""

from ..tools.installing import install_hint

try:
    from .culprit import find_culprit
    from .engine import EngineSummary, build_engine
    from .graph import export_onnx
    from .parity import Parity, measure_parity
    from .static_sizes import static_sizes
except ModuleNotFoundError as error:
    raise ImportError(f"dfine_plugin.export: {error}; {install_hint('export')}") from error

__all__ = ["EngineSummary", "Parity", "build_engine", "export_onnx", "find_culprit", "measure_parity", "static_sizes"]
