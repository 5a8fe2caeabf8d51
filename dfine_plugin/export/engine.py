"""TensorRT engines from ONNX graphs, by TensorRT-RTX or TensorRT itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError

from ..tools.targets import BACKENDS, compute_capability
from ..tools.writing import written_whole
from .precision import PRECISIONS


@dataclass(frozen=True)
class EngineSummary:
    """What was built: by which backend, for which compute capability, how large (``num_layers`` of the network that
    the parser makes of the graph) and in what time."""

    path: Path
    backend: str
    version: str
    target: str
    precision: str
    num_bytes: int
    num_layers: int
    seconds: float


def build_engine(
    onnx_path: str | Path,
    path: str | Path,
    target: str | None = None,
    precision: str = "fp16",
    backend: str | None = None,
    batch_sizes: tuple[int, int, int] = (1, 1, 8),
) -> EngineSummary:
    """Build an engine.

    Args:
        onnx_path: a graph that :func:`~dfine_plugin.export.export_onnx` wrote.
        path: of the engine.
        target: compute capability or GPU, such as ``"sm75"`` or ``"T4"``; by default the device at hand.
        precision: that of the graph: ``"fp32"``, ``"fp16"`` or ``"bf16"``. It is checked, not chosen here.
        backend: ``"tensorrt-rtx"`` or ``"tensorrt"``; by default the first of them that is installed.
        batch_sizes: least, usual and most images, for a graph with a batch of any size.

    Returns:
        What was built.

    Raises:
        ImportError: the backend is not installed; names the package.
        ValueError: the graph is of another precision, the target is unknown to the backend, or not the device at hand
            where the backend builds for no other.
        RuntimeError: the backend refuses the graph, with its own words.
    """
    target = compute_capability(target) if target is not None else None
    check_precision(onnx_path, precision)
    backend, trt = find_backend(backend)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    # from TensorRT 11 on every network is typed strongly, and the flag is ignored
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise RuntimeError(f"{backend} cannot parse {onnx_path}: {errors}")
    config = builder.create_builder_config()
    target = _set_target(trt, config, backend, target)
    _set_batch_sizes(builder, network, config, batch_sizes)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"{backend} cannot build {onnx_path} for {target}: {'; '.join(logger.errors)}")
    seconds = time.perf_counter() - start
    with written_whole(Path(path)) as part:
        part.write_bytes(memoryview(engine))
    return EngineSummary(
        Path(path), backend, trt.__version__, target, precision, engine.nbytes, network.num_layers, seconds
    )


def check_precision(onnx_path: str | Path, precision: str) -> None:
    """Refuse a graph whose matrix products and convolutions are not all of this precision.

    Raises:
        ValueError: says how many are not, and names one; or the file holds no graph.
    """
    if precision not in ("fp32", *PRECISIONS):
        raise ValueError(f"precision must be fp32, {' or '.join(PRECISIONS)}, got {precision!r}")
    wanted = PRECISIONS.get(precision, ir.DataType.FLOAT)
    try:
        graph = ir.load(onnx_path).graph
    except (DecodeError, ValueError) as error:
        raise ValueError(f"{onnx_path} is no ONNX graph: {error}") from error
    products = [node for node in graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    if not products:
        raise ValueError(f"{onnx_path} holds no matrix product and no convolution: it is no graph of a detector")
    other = [node for node in products if node.outputs[0].dtype != wanted]
    if other:
        raise ValueError(
            f"{len(other)} of {len(products)} matrix products and convolutions of {onnx_path} are not {precision} "
            f"(one is {other[0].name}, {other[0].outputs[0].dtype}). An engine has the precision of its graph: export "
            f"it with precision {precision}"
        )


def find_backend(backend: str | None = None) -> tuple[str, ModuleType]:
    """The backend's name and module; see :func:`build_engine`."""
    if backend is None:
        backend = next((name for name, module in BACKENDS.items() if find_spec(module) is not None), None)
        if backend is None:
            raise ImportError("no TensorRT is installed: pip install tensorrt-rtx (or tensorrt, on the target device)")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be {' or '.join(BACKENDS)}, got {backend!r}")
    try:
        return backend, import_module(BACKENDS[backend])
    except ImportError as error:
        raise ImportError(f"{backend} is not installed: pip install {backend} ({error})") from error


def _logger(trt: Any) -> Any:
    class Errors(trt.ILogger):
        """Keeps what went wrong, for the exception."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Errors()


def _set_target(trt: ModuleType, config: Any, backend: str, target: str | None) -> str:
    if backend == "tensorrt":
        present = _device_capability()
        if target not in (None, present):
            raise ValueError(
                f"tensorrt builds for the device at hand ({present}) only, not for {target}; tensorrt-rtx can"
            )
        return present
    if target is None:
        target = _device_capability()
    capability = getattr(trt.ComputeCapability, target.upper(), None)
    if capability is None:
        known = sorted(name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
        raise ValueError(f"{backend} knows {', '.join(known)}, not {target}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    return target


def _device_capability() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no GPU to build for: name a target, such as sm75")
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _set_batch_sizes(builder: Any, network: Any, config: Any, batch_sizes: tuple[int, int, int]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if all(tensor.shape[0] >= 0 for tensor in inputs):
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        _, *rest = tensor.shape
        profile.set_shape(tensor.name, *((count, *rest) for count in batch_sizes))
    config.add_optimization_profile(profile)
