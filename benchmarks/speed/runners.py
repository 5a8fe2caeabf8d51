"""One inference of one model on one backend, on a batch that stays on its device.

Each backend has its own idea of float32: on newer GPUs PyTorch's convolutions, onnxruntime and TensorRT use TF32, and
OpenVINO computes in bfloat16 on a CPU that can, unless it is told not to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dfine_plugin.benchmarks.speed.backends import BACKENDS, CPU_BACKENDS, LOWERED
from dfine_plugin.export import static_sizes
from dfine_plugin.export.engine import find_backend
from dfine_plugin.export.graph import inference_module
from dfine_plugin.export.parity import Detections, best_detections
from dfine_plugin.tools.installing import install_hint
from dfine_plugin.tools.targets import BACKENDS as ENGINE_BACKENDS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_backend(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot run here.

    Raises:
        ValueError: unknown, or for another device; says which are for this one.
        ImportError: not installed; names the package.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{backend!r} is not one of {', '.join(BACKENDS)}")
    if device.type == "cpu" and backend not in CPU_BACKENDS:
        why = "the device is the CPU" if torch.cuda.is_available() else "there is none here"
        raise ValueError(f"{backend} runs on a GPU, and {why}. On a CPU run {', '.join(CPU_BACKENDS)}")
    if device.type == "cuda" and backend in LOWERED:
        raise ValueError(f"{backend} runs on a CPU: give --device cpu")
    if backend in ENGINE_BACKENDS:
        find_backend(backend)
    if backend in OPENVINO_TYPES:
        check_openvino(backend)
    cuda_missing = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    if backend == "onnxruntime" and device.type == "cuda" and cuda_missing:
        raise ImportError("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu in its place")


def check_openvino(backend: str) -> None:
    """Refuse OpenVINO where it is not, and bfloat16 where the CPU has none, for it would compute in float32 instead.

    Raises:
        ImportError, ValueError: see :func:`check_backend`.
    """
    if find_spec("openvino") is None:
        raise ImportError(f"openvino is not installed: {install_hint('openvino')}")
    from openvino import Core

    kinds = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if LOWERED[backend].upper() not in kinds:
        raise ValueError(f"{backend} wants a CPU with {LOWERED[backend]}, and OpenVINO finds {', '.join(kinds)}")


class Runner(ABC):
    """A model on a backend, with its batch of images.

    Args:
        images: ``(B, 3, H, W)`` float32, on the device to run on. They are copied.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()

    @abstractmethod
    def run(self) -> None:
        """One inference; returns when its outputs are there."""

    @abstractmethod
    def outputs(self) -> Mapping[str, Tensor]:
        """The last inference's, by the names of :func:`~dfine_plugin.export.export_onnx`, on the CPU."""

    def detect(self, images: Iterable[Tensor]) -> list[Detections]:
        """What it detects in each image ``(3, H, W)``, given alone: as the whole batch."""
        found = []
        for image in images:
            self.images.copy_(image.expand_as(self.images))
            _wait(self.images.device)
            self.run()
            outputs = self.outputs()
            if "logits" in outputs:
                found.append(best_detections(outputs["logits"][0].float(), outputs["boxes"][0].float(), image))
            else:
                found.append(Detections(*(outputs[name][0].numpy() for name in ("scores", "labels", "boxes"))))
        return found


class Eager(Runner):
    """PyTorch, operation by operation; in half precision as autocast casts.

    Not a model cast as a whole: the hosts' own arithmetic of positions and boxes does not survive that (Deformable-DETR
    then predicts NaN). What autocast would cast at every call, the weights of linear layers and convolutions, is cast
    once.
    """

    def __init__(self, images: Tensor, model: nn.Module, precision: str) -> None:
        super().__init__(images)
        self.dtype = DTYPES[precision]
        detector = inference_module(model).to(images.device)
        for module in detector.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(self.dtype)
        self.detector: Callable[[Tensor], tuple[Tensor, Tensor]] = detector
        self.found: tuple[Tensor, Tensor]

    def forward(self) -> tuple[Tensor, Tensor]:
        half = self.dtype != torch.float32
        # without a cache: a captured graph must not hold on to what a cache lets go
        cast = torch.autocast(self.images.device.type, self.dtype if half else None, enabled=half, cache_enabled=False)
        with torch.no_grad(), cast:
            return self.detector(self.images)

    def run(self) -> None:
        self.found = self.forward()
        _wait(self.images.device)

    def outputs(self) -> Mapping[str, Tensor]:
        logits, boxes = self.found
        return {"logits": logits.cpu(), "boxes": boxes.cpu()}


class Compiled(Eager):
    """PyTorch with ``torch.compile``."""

    def __init__(self, images: Tensor, model: nn.Module, precision: str) -> None:
        super().__init__(images, model, precision)
        self.detector = torch.compile(self.detector)
        with static_sizes():
            self.run()


class CUDAGraph(Eager):
    """PyTorch's eager operations, captured once in a CUDA graph and replayed.

    Raises:
        RuntimeError: the model cannot be captured, for its forward waits for the device or copies from the host.
    """

    def __init__(self, images: Tensor, model: nn.Module, precision: str) -> None:
        super().__init__(images, model, precision)
        side = torch.cuda.Stream(images.device)
        side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(side):
            for _ in range(3):  # what libraries set up at first calls cannot be captured
                self.forward()
        torch.cuda.current_stream(images.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.found = self.forward()
        except RuntimeError as error:
            raise RuntimeError(f"this {type(model).__name__} cannot be captured in a CUDA graph: {error}") from error

    def run(self) -> None:
        self.graph.replay()
        _wait(self.images.device)


class OnnxRuntime(Runner):
    """onnxruntime on the CPU or on CUDA, its inputs and outputs bound to the device.

    On a CPU with as many threads as PyTorch has.

    Raises:
        ValueError: the graph is for images of another shape.
    """

    def __init__(self, images: Tensor, graph: Path) -> None:
        super().__init__(images)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        device = images.device
        on_gpu = device.type == "cuda"
        index = device.index or 0
        cuda = ("CUDAExecutionProvider", {"device_id": index})
        providers = [*([cuda] if on_gpu else []), "CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=providers)
        self.binding = self.session.io_binding()
        self.inputs = {}
        for given in self.session.get_inputs():
            _check_shape(graph, given.name, given.shape, self.images)
            tensor = self.inputs[given.name] = _input(given.name, self.images)
            kind = np.float32 if tensor.dtype == torch.float32 else np.int64
            self.binding.bind_input(given.name, device.type, index, kind, tuple(tensor.shape), tensor.data_ptr())
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name, device.type, index)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def outputs(self) -> Mapping[str, Tensor]:
        names = (output.name for output in self.session.get_outputs())
        arrays = self.binding.copy_outputs_to_cpu()
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


class OpenVINO(Runner):
    """OpenVINO on the CPU, which reads the images where they lie.

    With as many threads as PyTorch has.

    Raises:
        ValueError: the graph is for images of another shape.
    """

    def __init__(self, images: Tensor, graph: Path, backend: str) -> None:
        super().__init__(images)
        from openvino import Core
        from openvino import Tensor as View

        settings = {
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[backend],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.model = Core().compile_model(graph, "CPU", settings)
        self.request = self.model.create_infer_request()
        self.inputs = {}
        for given in self.model.inputs:
            name = given.get_any_name()
            shape = [size.get_length() if size.is_static else None for size in given.get_partial_shape()]
            _check_shape(graph, name, shape, self.images)
            self.inputs[name] = _input(name, self.images)
            self.request.set_tensor(given, View(self.inputs[name].numpy(), shared_memory=True))

    def run(self) -> None:
        self.request.infer()

    def outputs(self) -> Mapping[str, Tensor]:
        arrays = {output.get_any_name(): self.request.get_tensor(output).data for output in self.model.outputs}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


class Engine(Runner):
    """An engine of TensorRT-RTX or TensorRT, on tensors of PyTorch's.

    Raises:
        RuntimeError: the backend cannot load the engine, or an inference fails; with the backend's own words.
        ValueError: the engine is for images of another shape.
    """

    def __init__(self, images: Tensor, path: Path, backend: str) -> None:
        super().__init__(images)
        self.backend = backend
        _, trt = find_backend(backend)
        self.stream = torch.cuda.Stream(images.device)
        self.runtime = trt.Runtime(trt.Logger(trt.ILogger.Severity.ERROR))
        with torch.cuda.device(images.device):
            self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
            if self.engine is None:
                raise RuntimeError(f"{backend} {trt.__version__} cannot load {path}: built by another version or GPU?")
            self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        given = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.tensors: dict[str, Tensor] = {}
        for name in given:
            _check_shape(path, name, tuple(self.engine.get_tensor_shape(name)), self.images)
            self.tensors[name] = _input(name, self.images)
            if not self.context.set_input_shape(name, tuple(self.tensors[name].shape)):
                raise ValueError(f"{path} takes no {name} of shape {tuple(self.tensors[name].shape)}")
        self.output_names = [name for name in names if name not in given]
        dtypes = _torch_dtypes(trt)
        for name in self.output_names:
            shape, dtype = tuple(self.context.get_tensor_shape(name)), dtypes[self.engine.get_tensor_dtype(name)]
            self.tensors[name] = torch.empty(shape, dtype=dtype, device=images.device)
        for name, tensor in self.tensors.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"{backend} does not take an address for {name} of {path}")
        _wait(images.device)

    def run(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError(f"{self.backend} could not run the engine")
        self.stream.synchronize()

    def outputs(self) -> Mapping[str, Tensor]:
        return {name: self.tensors[name].cpu() for name in self.output_names}


OPENVINO_TYPES = {"openvino": "f32", "openvino-bf16": "bf16"}
"""What OpenVINO calls the precisions of its backends."""
TORCH_BACKENDS: dict[str, type[Eager]] = {"torch": Eager, "torch-compile": Compiled, "torch-cudagraph": CUDAGraph}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _input(name: str, images: Tensor) -> Tensor:
    """The images, or the sizes that boxes shall be given in: their own."""
    if name == "images":
        return images
    height, width = images.shape[-2:]
    return torch.tensor([[height, width]] * len(images), device=images.device)


def _check_shape(path: Path, name: str, shape: Iterable[Any], images: Tensor) -> None:
    """Sizes that are no numbers, or negative, are open."""
    expected = tuple(shape)
    if name not in ("images", "target_sizes"):
        raise ValueError(f"{path} has an input {name!r}; an exported graph takes images, and target_sizes at most")
    wanted = _input(name, images).shape
    fits = [not isinstance(size, int) or size < 0 or size == want for size, want in zip(expected, wanted, strict=True)]
    if not all(fits):
        raise ValueError(f"{path} takes {name} of shape {expected}, and is to run on {tuple(wanted)}")


def _torch_dtypes(trt: Any) -> dict[Any, torch.dtype]:
    kinds = trt.DataType
    return {
        kinds.FLOAT: torch.float32,
        kinds.HALF: torch.float16,
        kinds.BF16: torch.bfloat16,
        kinds.INT32: torch.int32,
        kinds.INT64: torch.int64,
    }
