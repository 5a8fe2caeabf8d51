"""Engines of TensorRT 10 and 11, as far as their Python API goes: every call binds, and no other is made.

TensorRT needs a GPU's driver. What its bindings say of themselves does not: see tensorrt_api.
"""

import ctypes
import sys
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

from dfine_plugin.benchmarks.speed.runners import Engine
from dfine_plugin.export import build_engine, engine
from dfine_plugin.tools.targets import BACKENDS

from .tensorrt_api import lines
from .tensorrt_stand_in import StandIn

TABLES = [Path(__file__).with_name(f"{name}.txt") for name in ("tensorrt_10", "tensorrt_11", "tensorrt_rtx_1")]
IMAGE = (3, 32, 48)
SHAPES = {"images": (1, *IMAGE), "logits": (1, 5, 4), "boxes": (1, 5, 4)}
NETWORK = {
    "INetworkDefinition.num_inputs": 1,
    "INetworkDefinition.num_layers": 7,
    "ITensor.shape": (-1, *IMAGE),
    "ITensor.name": "images",
    "IBuilderConfig.add_optimization_profile": 0,
    "IHostMemory.nbytes": 4,
}


@pytest.fixture(params=TABLES, ids=lambda path: path.stem)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in where the backend is imported from, beside a GPU to build for."""
    module = StandIn(request.param, NETWORK)
    monkeypatch.setitem(sys.modules, BACKENDS[backend_of(module)], module)
    monkeypatch.setattr(engine, "_device_capability", lambda: "sm75")
    return module


def backend_of(trt: StandIn) -> str:
    return "tensorrt-rtx" if "rtx" in trt.__name__ else "tensorrt"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one product, in float32: what is in it is the parser's affair."""
    given, product = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("in", "out"))
    node = helper.make_node("MatMul", ["in", "in"], ["out"])
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "product", [given], [product])), path)
    return path


def test_every_call_is_one_that_the_version_has(
    trt: StandIn, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every member of the table is called, by building and running or by telling why neither went well."""
    networks, profiles, backend, path = [], [], backend_of(trt), tmp_path / "model.engine"
    trt.answers |= {
        "Builder.create_network": lambda builder, flags: networks.append(flags) or trt.INetworkDefinition(),
        "Builder.build_serialized_network": lambda builder, network, config: trt.IHostMemory(b"plan"),
        "IOptimizationProfile.set_shape": lambda profile, *shapes: profiles.append(shapes),
    }
    built = build_engine(graph, path, precision="fp32", backend=backend, batch_sizes=(1, 2, 8))
    assert (built.backend, built.version, built.target) == (backend, trt.__version__, "sm75")
    assert (built.num_bytes, built.num_layers, path.read_bytes()) == (4, 7, b"plan")
    assert networks == [1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED]
    assert profiles == [("images", *((count, *IMAGE) for count in (1, 2, 8)))]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    trt.answers |= running(trt)
    runner = Engine(torch.full((1, *IMAGE), 3.0), path, backend)
    runner.run()
    outputs = runner.outputs()
    assert torch.equal(outputs["logits"], torch.full(SHAPES["logits"], 3.0))
    assert torch.equal(outputs["boxes"], torch.full(SHAPES["boxes"], 6.0))
    path.write_bytes(b"of another version")
    with pytest.raises(RuntimeError, match=rf"{backend} {trt.__version__} cannot load .*model.engine"):
        Engine(torch.zeros(1, *IMAGE), path, backend)
    # those of the next test
    failures = {"ILogger.log", "OnnxParser.num_errors", "OnnxParser.get_error", "ParserError.desc"}
    assert trt.used == trt.members - failures


def running(trt: StandIn) -> dict[str, Any]:
    """An engine that fills its outputs with the mean of its images, and with twice that."""
    addresses: dict[str, int] = {}

    def mode(engine: Any, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name == "images" else trt.TensorIOMode.OUTPUT

    def set_address(context: Any, name: str, address: int) -> bool:
        addresses[name] = address
        return True

    def execute(context: Any, stream: int) -> bool:
        images, logits, boxes = (_at(addresses[name], shape) for name, shape in SHAPES.items())
        logits.fill_(images.mean())
        boxes.fill_(2 * images.mean())
        return True

    return {
        "Runtime.deserialize_cuda_engine": lambda runtime, plan: trt.ICudaEngine() if plan == b"plan" else None,
        "ICudaEngine.num_io_tensors": len(SHAPES),
        "ICudaEngine.get_tensor_name": lambda engine, index: [*SHAPES][index],
        "ICudaEngine.get_tensor_mode": mode,
        "ICudaEngine.get_tensor_shape": lambda engine, name: (-1, *SHAPES[name][1:]),
        "ICudaEngine.get_tensor_dtype": lambda engine, name: trt.DataType.FLOAT,
        "IExecutionContext.get_tensor_shape": lambda context, name: SHAPES[name],
        "IExecutionContext.set_tensor_address": set_address,
        "IExecutionContext.execute_async_v3": execute,
    }


def test_a_refusal_is_told_in_the_backends_words(trt: StandIn, graph: Path, tmp_path: Path) -> None:
    backend, loggers = backend_of(trt), []

    def build(builder: Any, network: Any, config: Any) -> None:
        loggers[0].log(trt.ILogger.Severity.WARNING, "slow")
        loggers[0].log(trt.ILogger.Severity.ERROR, "no kernel")

    trt.answers |= {"Builder.__init__": lambda builder, logger: loggers.append(logger)}
    trt.answers |= {"Builder.build_serialized_network": build}
    with pytest.raises(RuntimeError, match=f"^{backend} cannot build .* for sm75: no kernel$"):
        build_engine(graph, tmp_path / "model.engine", precision="fp32", backend=backend)
    trt.answers |= {"OnnxParser.parse_from_file": False, "OnnxParser.num_errors": 2, "ParserError.desc": "no such op"}
    with pytest.raises(RuntimeError, match=f"^{backend} cannot parse .*: no such op; no such op$"):
        build_engine(graph, tmp_path / "model.engine", precision="fp32", backend=backend)


def test_a_stand_in_refuses_what_the_bindings_refuse(trt: StandIn) -> None:
    builder = trt.Builder(trt.Logger())
    network = builder.create_network()
    with pytest.raises(AttributeError):
        builder.build_engine(network)  # gone since 10
    with pytest.raises(AttributeError):
        builder.max_batch_size = 1
    with pytest.raises(AttributeError):
        network.num_inputs = 2
    for arguments in ((), (network,), (network, network), (network, builder.create_builder_config(), 1, 2)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            builder.build_serialized_network(*arguments)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_optimization_profile().set_shape("images", (1, 3), (1, 3), ("B", 3))


@pytest.mark.tensorrt
@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_a_table_is_what_the_installed_version_says(table: Path) -> None:
    """Of what is installed of them: TensorRT-RTX wherever the tests of engines run."""
    name = "tensorrt_rtx" if "rtx" in table.stem else "tensorrt"
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    first, *rest = lines(import_module(name))
    written, *expected = table.read_text().splitlines()
    if first.split(".")[0] != written.split(".")[0]:
        pytest.skip(f"{name} is of another major version")
    assert rest == expected


def _at(address: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 tensor that lies at an address of the CPU's memory."""
    count = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(shape)
