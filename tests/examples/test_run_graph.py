"""The example that runs a graph: what it prints is what torch finds, and it needs no torch for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from transformers import RTDetrImageProcessor
from typer.testing import CliRunner

from dfine_plugin import load_pretrained, wrap_decoder
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.trained_hosts import load_trained
from dfine_plugin.tools.commands import app

from ..coco_folder import SIDE
from .conftest import EXAMPLES

WITHOUT = ("torch", "torchvision", "transformers", "scipy", "dfine_plugin")
SCRIPT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({WITHOUT}))  # importing one of them fails
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", SCRIPT, EXAMPLES / "run_graph.py", *arguments]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True)


def export(model: Path, output: Path, *options: object) -> None:
    words = ["export", "--model", model, "--output", output, *options]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapped model, whose images are normalised in no usual way, its graph, and a photo that is not square."""
    folder = tmp_path_factory.mktemp("graph")
    model = wrap_decoder(load_trained("rt-detr"))
    model.save_pretrained(folder / "model")
    size = {"height": SIDE, "width": SIDE}
    processor = RTDetrImageProcessor(
        size=size, do_normalize=True, image_mean=[0.6, 0.5, 0.4], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder / "model")
    export(folder / "model", folder / "model.onnx", "--detections", 20, "--deviations")
    to_pil_image(make_shapes(1, SIDE, seed=1).images[0]).resize((300, 200)).save(folder / "photo.png")
    return folder


@pytest.mark.slow
def test_it_prints_what_torch_finds(folder: Path) -> None:
    model, processor = load_pretrained(folder / "model"), RTDetrImageProcessor.from_pretrained(folder / "model")
    with Image.open(folder / "photo.png") as photo, torch.no_grad():
        outputs = model(**processor(photo, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=[(200, 300)])
    assert len(wanted["scores"]) > 1

    result = run(folder / "model.onnx", folder / "photo.png", "--threshold", 0.3)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.rsplit(" ", 5) for line in result.stdout.splitlines()]
    assert [name for name, *_ in lines] == [model.config.id2label[int(label)] for label in wanted["labels"]]
    figures = np.array([[float(word) for word in words] for _, *words in lines])
    # Pillow and torchvision scale to whole numbers that differ by one here and there
    np.testing.assert_allclose(figures[:, 0], wanted["scores"], atol=0.005)
    np.testing.assert_allclose(figures[:, 1:], wanted["boxes"], atol=0.5)


@pytest.mark.slow
def test_it_gives_channels_in_the_graphs_order(folder: Path, tmp_path: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    (about,) = (entry for entry in graph.metadata_props if entry.key == "normalisation")
    about.value = json.dumps({**json.loads(about.value), "channels": "BGR"})
    onnx.save(graph, tmp_path / "bgr.onnx")
    with Image.open(folder / "photo.png") as photo:
        Image.merge("RGB", photo.split()[::-1]).save(tmp_path / "photo.png")
    result = run(tmp_path / "bgr.onnx", tmp_path / "photo.png")
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(folder / "model.onnx", folder / "photo.png").stdout != ""


def test_what_it_refuses(tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "photo.png")
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    boxes = onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    node = onnx.helper.make_node("Identity", ["images"], ["boxes"])
    graph = onnx.helper.make_graph([node], "graph", [images], [boxes])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "strange.onnx")
    onnx.helper.set_model_props(model, {"normalisation": "{}"})  # as of a graph that does not select detections
    onnx.save(model, tmp_path / "whole.onnx")
    for name, said in (
        ("nothing.onnx", "nothing.onnx is no file"),
        ("strange.onnx", "strange.onnx is no graph that `dfine-plugin export --detections 300` wrote"),
        ("whole.onnx", "whole.onnx is no graph that `dfine-plugin export --detections 300` wrote"),
    ):
        result = run(tmp_path / name, tmp_path / "photo.png")
        assert result.returncode == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr
