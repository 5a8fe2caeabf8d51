"""What is wrong with a command's input is told in one line, before a model is loaded."""

import json
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig
from typer.testing import CliRunner

from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.export import coco
from dfine_plugin.tools.cli import main
from dfine_plugin.tools.commands import app
from dfine_plugin.tools.pictures import read_picture

from ..adapters.hosts import build, wrapped
from ..adapters.transformers_hosts import HOSTS

ROWS = {host.name: host for host in HOSTS}


def refused(*arguments: object) -> str:
    """What is said of arguments that are refused."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})
    # an exception of its own would be the traceback that nobody wants
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture
def unread(tmp_path: Path) -> Path:
    """A folder that looks like a model's until its weights are read."""
    wrapped(ROWS["rt-detr"]).config.save_pretrained(tmp_path / "unread")
    return tmp_path / "unread"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg", quality=95)
    return tmp_path / "picture.jpg"


def _huge(path: Path) -> None:
    """300 megapixels, as the header of a PNG says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 15_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


SPOILT = [
    (lambda path: path.write_text("text"), "cannot identify image file"),
    (_truncate, "image file is truncated"),
    (_huge, "Image size (300000000 pixels) exceeds limit of 178956970 pixels"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT, ids=["no picture", "truncated", "300 Mpx"])
def test_a_picture_that_cannot_be_read(
    spoil: Callable[[Path], object], said: str, unread: Path, picture: Path, tmp_path: Path
) -> None:
    spoil(picture)
    output = refused("show", "--model", unread, "--image", picture)
    assert f"Invalid value for --image: {picture} cannot be read: {said}" in output
    (tmp_path / "images").mkdir()
    picture = picture.rename(tmp_path / "images" / picture.name)
    output = refused("export", "--model", unread, "--images", picture.parent)
    assert f"Invalid value for --images: {picture} cannot be read: {said}" in output


def test_a_picture_of_many_pixels_is_read_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("L", (10_000, 9_500)).save(tmp_path / "large.png", compress_level=1)
    assert read_picture(tmp_path / "large.png").size == (10_000, 9_500)
    assert not recwarn


def test_data_that_is_none(unread: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    call = ("export", "--model", unread, "--data", data)
    assert "instances_val.json cannot be read" in refused(*call)
    for content, said in [
        ("{", "instances_val.json cannot be read"),
        ("3", "instances_val.json cannot be read"),
        ('{"images": [{}]}', "is not in COCO's format: it has no annotations and no categories"),
        ('{"images": [], "annotations": [], "categories": [{}]}', "it has no images and no annotations"),
    ]:
        (data / "instances_val.json").write_text(content)
        assert said in refused(*call)
    split = {"images": [{"file_name": "0.png"}], "annotations": [{}], "categories": [{"id": 1, "name": "a"}]}
    (data / "instances_val.json").write_text(json.dumps(split))
    assert f"{data / 'images' / '0.png'} cannot be read: " in refused(*call)
    Image.new("RGB", (80, 60)).save(data / "images" / "0.png")
    said = f"Invalid value for --data: the model has 3 classes, and {data} 1 categories, which are not all among them"
    assert said in refused(*call)
    assert "Invalid value for --images: either this or --data" in refused(*call, "--images", data)
    assert "either this or --dynamic-batch" in refused(*call, "--dynamic-batch", "--batch-size", 2)


def test_ap_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "find_spec", lambda name: None)
    call = ["dfine-plugin", "export", "--model", str(tmp_path), "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit, match=r"^dfine-plugin: AP needs pycocotools: pip install .*\[export,bench\]'$"):
        main()


@pytest.mark.parametrize("name", ["rt-detr", "rt-detr-v2", "deformable-detr-two-stage", "lw-detr", "rf-detr"])
def test_sizes_that_a_host_cannot_take(name: str, tmp_path: Path) -> None:
    """Whether a size is refused before the model is loaded is whether the loaded model would have taken it."""
    if ROWS[name].missing:
        pytest.skip(ROWS[name].missing)
    model = build(ROWS[name])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for side in (40, 64, 72, 73, 88, 89, 90, 96, 97):
        try:
            checkpoint.check_size((side, 64))
            told = False
        except ValueError:
            told = True
        try:
            with torch.no_grad():
                model(torch.rand(1, 3, side, 64))
            taken = True
        except RuntimeError:
            taken = False
        assert told is not taken, side


def test_a_size_that_the_host_cannot_take_is_told_first(unread: Path, picture: Path) -> None:
    said = "Invalid value for --image-size: this host cannot take images of 161 x 161"
    assert said in refused("export", "--model", unread, "--image-size", 161)
    assert said in refused("show", "--model", unread, "--image", picture, "--image-size", 161)


def test_names_that_no_writer_takes(unread: Path, picture: Path, tmp_path: Path) -> None:
    show = ("show", "--model", unread, "--image", picture, "--output")
    export = ("export", "--model", unread, "--output")
    build = ("build-engine", picture, "--output")
    assert re.search(r"'picture.bmp' does not end in one of .*\.pdf, .*\.png", refused(*show, "picture.bmp"))
    assert "'picture' does not end in one of" in refused(*show, "picture")
    assert "'model.pt' does not end in .onnx" in refused(*export, "model.pt")
    (tmp_path / "folder.onnx").mkdir()
    assert "is a directory" in refused(*export, tmp_path / "folder.onnx")
    for call, name in ((show, "a.png"), (export, "a.onnx"), (build, "a.engine")):
        assert f"{picture} is no folder that can be written to" in refused(*call, picture / "new" / name)


def test_graphs_and_targets_that_are_none(picture: Path) -> None:
    assert "target 'T5' is no compute capability such as sm75" in refused("build-engine", picture, "--target", "T5")
    result = CliRunner().invoke(app, ["build-engine", str(picture), "--target", "T4"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert f"error: {picture} is no ONNX graph" in result.output


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    model = wrapped(ROWS["rt-detr"])
    call = ("export", "--image-size", 64, "--model", tmp_path)
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[:1000])
    assert f"Invalid value for --model: {tmp_path} cannot be loaded: " in refused(*call)
    weights.write_bytes(whole)
    config.write_text(text[:-20])
    assert f"Invalid value for --model: {tmp_path} cannot be read: " in refused(*call)
    config.write_text(text.replace('"d_model": 32', '"d_model": 64'))
    assert f"Invalid value for --model: {tmp_path} cannot be loaded: " in refused(*call)
    config.write_text(json.dumps({"model_type": "no such thing"}))
    assert f"Invalid value for --model: {tmp_path} cannot be read: " in refused(*call)
    build(ROWS["rt-detr"]).save_pretrained(tmp_path)
    held = load_file(weights)
    save_file({name: x for name, x in held.items() if "bbox_embed.0" not in name}, weights, {"format": "pt"})
    said = f"{tmp_path} cannot be loaded: it lacks weights of the RTDetrForObjectDetection: model.decoder.bbox_embed.0."
    assert said in refused(*call)
    BertConfig().save_pretrained(tmp_path)
    said = f"Invalid value for --model: {tmp_path} cannot be loaded: Unrecognized configuration class .*AutoModel"
    assert re.search(rf"{said}ForObjectDetection\. ", refused(*call))
    wrapped(ROWS["grounding-dino"]).config.save_pretrained(tmp_path)
    said = f"Invalid value for --model: {tmp_path} cannot be read: "
    assert f"{said}it wants a text beside each image, such as 'a cat. a dog.', and none" in refused(*call)
    assert f"{said}there is no tokenizer of its own beside it" in refused(*call, "--text", "a cat.")
    wrapped(ROWS["rt-detr"]).config.save_pretrained(tmp_path)
    assert f"{said}it takes no text" in refused(*call, "--text", "a cat.")


def test_more_detections_than_there_are(tmp_path: Path) -> None:
    wrapped(ROWS["deformable-detr-refine"]).save_pretrained(tmp_path)
    call = ("export", "--model", tmp_path, "--image-size", 64, "--output", tmp_path / "model.onnx")
    assert "num_detections must be in [1, 36], queries times classes; got 37" in refused(*call, "--detections", 37)
