"""A model as an ONNX graph."""

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from .. import __version__
from ..errors import WrapStateError
from ..registry import find_adapter
from ..tools.writing import written_whole
from ..wrapping import binding_of, deploy
from .postprocess import DetectorWithDeviations, DetectorWithPostprocess
from .precision import to_precision
from .static_sizes import static_sizes

OPSET = 18
"""The lowest that torch writes; LayerNormalization has been one op since 17."""
BOXES = "cx, cy, w, h in units of the image's sides"
SELECTED_BOXES = "x0, y0, x1, y1 in pixels of an image of target_sizes (height, width)"
DEVIATIONS = "standard deviations of left, top, right, bottom in units of the image's sides"
SELECTED_DEVIATIONS = "standard deviations of x0, y0, x1, y1 in pixels of an image of target_sizes (height, width)"


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: tuple[int, int] = (640, 640),
    batch_size: int | None = 1,
    precision: str = "fp32",
    num_detections: int | None = None,
    opset: int = OPSET,
    keep_float32: Iterable[str] = (),
    simulate: bool = False,
    metadata: Mapping[str, Any] | None = None,
    deviations: bool = False,
) -> Path:
    """Write a model, wrapped or bare, as ONNX. The model itself stays as it is: a copy of it is deployed.

    Inputs and outputs are float32 whatever the precision. Inputs: ``images (B, 3, H, W)`` as the host takes them
    (transformers: scaled and normalised as in training; detrex: as its data loader gives them), and with
    ``num_detections`` also ``target_sizes (B, 2)`` int64, height and width that boxes shall be given in. Outputs:
    ``logits (B, Q, classes)`` and ``boxes (B, Q, 4)`` cxcywh in image sides; with ``num_detections`` instead
    ``scores``, ``labels`` and ``boxes (B, n, 4)`` xyxy in pixels, best first. With ``deviations`` also
    ``deviations (B, Q, 4)`` in image sides, or ``(B, n, 4)`` in pixels: :func:`~dfine_plugin.edge_deviations` of left,
    top, right, bottom.

    The graph says what whoever runs it has to know, each entry of its metadata as JSON: ``version`` (this package's),
    ``precision``, ``input_size`` (H and W), ``box_format``, and what ``metadata`` adds.

    Args:
        model: in evaluation mode.
        path: of the file; beyond 2 GB the weights lie beside it.
        image_size: H and W.
        batch_size: B, or None for a batch of any size.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``; see :func:`~dfine_plugin.export.precision.to_precision`.
        num_detections: n, to have the selection of detections in the graph.
        opset: 18 or higher.
        keep_float32: dotted names of submodules that stay in float32 in a graph of lower precision.
        simulate: compute in float32 and round as the precision would, for a runtime that lacks its ops, such as
            onnxruntime on a CPU for bf16.
        metadata: further entries that JSON can hold; the command adds ``class_names``, by class, and ``normalisation``
            (:meth:`~dfine_plugin.checkpoints.Checkpoint.normalisation`).
        deviations: let the graph say how far off the boxes' edges may be.

    Returns:
        ``path``.

    Raises:
        UnsupportedModelError: no adapter knows the model, or it takes a text beside images and none has been fixed.
        WrapStateError: the model is in training mode.
        ValueError: a batch of none, an opset below 18, more detections than the model has, deviations of a model that
            is not wrapped, or a host that takes the number of images for a constant with a ``batch_size`` of None.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, or None for any, got {batch_size}")
    if opset < OPSET:
        raise ValueError(f"opset must be {OPSET} or higher, got {opset}")
    path = Path(path)
    exported = exported_model(model, image_size, batch_size, num_detections, opset, deviations)
    if precision != "fp32":
        # what a submodule is called in the graph
        within = "detector." * (deviations + (num_detections is not None)) + "model."
        decoder = within + find_adapter(model).decoder
        to_precision(exported, precision, decoder, [within + name for name in keep_float32], simulate)
    # the float32 originals of what was typed in lower precision
    RemoveUnusedNodesPass()(exported)
    for node in exported.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # the paths of this machine, at every node
    about = {
        "version": __version__,
        "precision": precision,
        "input_size": list(image_size),
        "box_format": BOXES if num_detections is None else SELECTED_BOXES,
        **({"deviations": DEVIATIONS if num_detections is None else SELECTED_DEVIATIONS} if deviations else {}),
        **(metadata or {}),
    }
    exported.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    with written_whole(path) as part:
        ir.save(exported, part)
    return path


def inference_module(model: nn.Module) -> nn.Module:
    """The model as a function of tensors (:meth:`Adapter.detector`), deployed where it is wrapped; a copy.

    Raises:
        WrapStateError: the model is in training mode.
    """
    if model.training:
        raise WrapStateError("export takes a model in evaluation mode; call model.eval() first")
    adapter = find_adapter(model)
    twin = copy.deepcopy(model)
    binding = binding_of(twin)
    if binding is not None and not binding.deployed:
        deploy(twin)
    return adapter.detector(twin).eval().requires_grad_(False)


def exported_model(
    model: nn.Module,
    image_size: tuple[int, int],
    batch_size: int | None,
    num_detections: int | None,
    opset: int,
    deviations: bool = False,
) -> ir.Model:
    """The float32 graph of :func:`export_onnx`."""
    detector = inference_module(model)
    in_graph = getattr(detector, "in_graph", nullcontext)
    if deviations:
        if binding_of(model) is None:
            name = type(model).__name__
            raise ValueError(f"this {name} is not wrapped: its boxes come from no distributions to take deviations of")
        detector = DetectorWithDeviations(detector).eval()
    device = next(detector.parameters()).device
    # nothing is computed with it: a number that no other size is a multiple of, lest they be taken for each other
    count = batch_size or 11
    images = torch.zeros(count, 3, *image_size, device=device)
    inputs: tuple[Tensor, ...] = (images,)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits", "boxes"]}
    if num_detections is not None:
        with torch.no_grad():
            logits, *_ = detector(images[:1])
        available = logits.shape[1] * logits.shape[2]
        if not 0 < num_detections <= available:
            raise ValueError(f"num_detections must be in [1, {available}], queries times classes; got {num_detections}")
        detector = DetectorWithPostprocess(detector, num_detections).eval()
        inputs = (images, torch.tensor([image_size] * count, device=device))
        names = {"input_names": ["images", "target_sizes"], "output_names": ["scores", "labels", "boxes"]}
    if deviations:
        names["output_names"].append("deviations")
    with torch.no_grad(), static_sizes(), _quiet(), in_graph(images[:1]):
        program = _trace(detector, inputs, dynamic_batch=batch_size is None)
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, **names)
    assert onnx_program is not None
    graph = onnx_program.model.graph
    _register_constants(graph)
    if batch_size is None:
        for value in (*graph.inputs, *graph.outputs):
            assert value.shape is not None
            value.shape[0] = "batch"
    return onnx_program.model


def _register_constants(graph: ir.Graph) -> None:
    """Make initializers of the constants that the exporter folded without telling the graph."""
    for node in graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None:
                assert value.name is not None
                if value.name not in graph.initializers and not value.is_graph_input():
                    graph.register_initializer(value)


def _trace(detector: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs) if dynamic_batch else None
    # By bytecode first: otherwise a cache of RT-DETR's takes the batch for a constant, and a check of RT-DETRv2's
    # becomes an op that ONNX lacks. The DN hosts branch on a tensor, which only tracing as they run knows the value of.
    try:
        program = torch.export.export(detector, inputs, dynamic_shapes=shapes, strict=True)
    except torch._dynamo.exc.TorchDynamoException:
        program = torch.export.export(detector, inputs, dynamic_shapes=shapes, strict=False)
    if dynamic_batch:
        (name,) = program.graph_signature.user_inputs[:1]
        placeholder = next(node for node in program.graph.nodes if node.name == name)
        if is_concrete_int(placeholder.meta["val"].shape[0]):
            raise ValueError("this host takes the number of images for a constant: export with a batch_size")
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
