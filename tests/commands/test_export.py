"""The commands `export` and `build-engine` from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.tools.commands import app
from dfine_plugin.tools.installing import install_hint

from ..adapters.hosts import IMAGE_SIZE, wrapped
from ..adapters.transformers_hosts import HOSTS

# its queries are learnt, not selected: no rounding decides which of many equal ones are taken
HOST = {host.name: host for host in HOSTS}["deformable-detr-refine"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wrapped model, and a data set of three images in COCO format."""
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    wrapped(HOST).save_pretrained(model)
    (data / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        pixels = random.integers(0, 256, (80, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"{i}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 80} for i in range(3)],
        "categories": [{"id": 10 + i, "name": str(i)} for i in range(3)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 11, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
        ],
    }
    (data / "instances_val.json").write_text(json.dumps(coco))
    return model, data


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
def test_export_in_half_precision_with_parity_and_ap(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = folders
    path = tmp_path / "new" / "model.onnx"
    options = ["--image-size", IMAGE_SIZE, "--precision", "fp16", "--detections", 20, "--deviations"]
    code, output = run("export", "--model", model, "--output", path, *options, "--data", data, "--threshold", 0.05)
    assert code == 0, output
    assert f"fp16, 1 images of {IMAGE_SIZE} x {IMAGE_SIZE}" in output
    assert "confident detections on 3 images: 0 lost" in output
    assert "AP " in output
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_outputs()] == ["scores", "labels", "boxes", "deviations"]
    assert session.get_inputs()[0].shape == [1, 3, IMAGE_SIZE, IMAGE_SIZE]

    code, output = run("build-engine", path, "--target", "sm75", "--precision", "fp32")
    assert code == 1
    assert "are not fp32" in output


@pytest.mark.slow
def test_a_graph_of_fewer_layers_is_that_layers_prediction(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = folders
    path = tmp_path / "model.onnx"
    options = ["--image-size", IMAGE_SIZE, "--num-layers", 2, "--threshold", 0.05]
    code, output = run("export", "--model", model, "--output", path, *options, "--data", data)
    assert code == 0, output
    images = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        _, (logits, boxes), _ = HOST.predict_layers(open_checkpoint(model).load(), images.expand(2, -1, -1, -1))
    for values, wanted in zip(found, (logits, boxes), strict=True):
        np.testing.assert_allclose(values[0], wanted[0].numpy(), rtol=1e-4, atol=2e-5)


def test_what_export_refuses(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = folders
    code, output = run("export", "--model", model, "--num-layers", 4, "--output", tmp_path / "model.onnx")
    assert code == 2
    assert "Invalid value for --num-layers: num_layers must be in [1, 3], the decoder's layers; got 4" in output
    code, output = run("export", "--model", tmp_path)
    assert code == 2
    assert "holds no model" in output
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = run("export", "--model", model, "--images", empty, "--output", tmp_path / "model.onnx")
    assert code == 2
    assert "holds no image" in output
    assert not (tmp_path / "model.onnx").exists()


def test_without_the_extra_the_error_names_it() -> None:
    code = "import sys; sys.modules['onnx_ir'] = None; import dfine_plugin.export"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: dfine_plugin.export" in result.stderr
    assert install_hint("export") in result.stderr
