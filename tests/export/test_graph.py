"""What an exported graph takes and gives, and what export refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import RTDetrImageProcessor

import dfine_plugin
from dfine_plugin import UnsupportedModelError, WrapStateError
from dfine_plugin.distributions import edge_distributions
from dfine_plugin.export import export_onnx
from dfine_plugin.export.precision import to_precision
from dfine_plugin.wrapping import predict_distributions

from ..adapters.hosts import IMAGE_SIZE, build, images, wrapped
from ..adapters.transformers_hosts import HOSTS

ROWS = {host.name: host for host in HOSTS}
SIZE = IMAGE_SIZE, IMAGE_SIZE


@pytest.mark.slow
def test_detections_in_the_graph_are_those_of_the_hosts_own_processor(tmp_path: Path) -> None:
    model = wrapped(ROWS["rt-detr"])
    inputs, sizes = images(3), torch.tensor([[480, 640], [64, 64], [1080, 1920]])
    path = export_onnx(model, tmp_path / "model.onnx", SIZE, batch_size=None, num_detections=12)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["scores", "labels", "boxes"], {"images": inputs.numpy(), "target_sizes": sizes.numpy()})
    assert found[1].dtype == np.int64
    with torch.no_grad():
        outputs = model(inputs)
    # the processor reports as many as there are queries: 12
    wanted = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for image, detections in enumerate(wanted):
        np.testing.assert_allclose(found[0][image], detections["scores"].numpy(), atol=1e-5)
        np.testing.assert_array_equal(found[1][image], detections["labels"].numpy())
        np.testing.assert_allclose(found[2][image], detections["boxes"].numpy(), rtol=1e-4, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_deviations_in_the_graph_are_those_of_the_selected_boxes_in_pixels(precision: str, tmp_path: Path) -> None:
    # its queries are learnt, not selected: no rounding decides which of many equal ones are taken
    model = wrapped(ROWS["deformable-detr-refine"])
    inputs, sizes = images(1), torch.tensor([[480, 640]])
    path = export_onnx(model, tmp_path / "model.onnx", SIZE, precision=precision, num_detections=9, deviations=True)
    about = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert about["deviations"].startswith("standard deviations of x0, y0, x1, y1 in pixels")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_outputs()] == ["scores", "labels", "boxes", "deviations"]
    assert {tensor.type for tensor in session.get_outputs()} == {"tensor(float)", "tensor(int64)"}
    _, labels, boxes, deviations = session.run(None, {"images": inputs.numpy(), "target_sizes": sizes.numpy()})

    _, _, record = predict_distributions(model, inputs)
    predicted = edge_distributions(record.initial_boxes[0], record.corner_logits[-1][0], record.weights, (640, 480))
    for box, label, found in zip(boxes[0], labels[0], deviations[0], strict=True):
        query = int((predicted.edges - torch.from_numpy(box)).abs().sum(-1).argmin())
        np.testing.assert_allclose(found, predicted.deviations[query], rtol=1e-4 if precision == "fp32" else 0.05)
        assert 0 <= label < 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_holds_what_it_uses_and_says_what_it_is(precision: str, tmp_path: Path) -> None:
    model = wrapped(ROWS["deformable-detr-refine"])
    path = export_onnx(model, tmp_path / "model.onnx", (64, 96), precision=precision, metadata={"author": "me"})
    graph = onnx.load(path).graph
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert graph.initializer
    assert [tensor.name for tensor in graph.initializer if tensor.name not in used] == []
    # where it was exported is nobody's business
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()

    about = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    boxes = "cx, cy, w, h in units of the image's sides"
    common = {"version": dfine_plugin.__version__, "precision": precision, "input_size": [64, 96]}
    assert about == {**common, "box_format": boxes, "author": "me"}


@pytest.mark.slow
def test_onnxruntime_has_nothing_to_say_of_a_graph(tmp_path: Path) -> None:
    path = export_onnx(wrapped(ROWS["rt-detr"]), tmp_path / "model.onnx", SIZE, precision="fp16", num_detections=5)
    code = f"import onnxruntime; onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


def test_what_export_refuses(tmp_path: Path) -> None:
    model = wrapped(ROWS["rt-detr"])
    path = tmp_path / "model.onnx"
    with pytest.raises(WrapStateError, match=r"model.eval\(\)"):
        export_onnx(model.train(), path, SIZE)
    model.eval()
    with pytest.raises(ValueError, match="opset must be 18 or higher, got 17"):
        export_onnx(model, path, SIZE, opset=17)
    with pytest.raises(ValueError, match=r"num_detections must be in \[1, 36\].*got 37"):
        export_onnx(model, path, SIZE, num_detections=37)
    with pytest.raises(ValueError, match="is not wrapped: its boxes come from no distributions"):
        export_onnx(build(ROWS["rt-detr"]), path, SIZE, deviations=True)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        export_onnx(nn.Linear(1, 1).eval(), path, SIZE)
    assert not path.exists()


def test_an_unknown_precision() -> None:
    with pytest.raises(ValueError, match="fp32, fp16 or bf16, got 'int8'"):
        to_precision(None, "int8", "decoder")  # type: ignore[arg-type]
