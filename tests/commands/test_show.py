"""The command `show` from end to end, and what its picture says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from typer.testing import CliRunner

from dfine_plugin.commands import app
from dfine_plugin.show import draw_detections, read_detections
from dfine_plugin.wrapping import predict_distributions

from ..adapters.hosts import NUM_LAYERS, build, images, wrapped
from ..adapters.transformers_hosts import HOSTS

ROWS = {host.name: host for host in HOSTS}
SIZE = (120, 80)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["show", *map(str, arguments)], env={"COLUMNS": "500"})
    return result.exit_code, result.output


@pytest.mark.parametrize("name", ["rt-detr", "deformable-detr-two-stage"])
def test_a_saved_model_gives_a_picture(name: str, picture: Path, tmp_path: Path) -> None:
    wrapped(ROWS[name]).save_pretrained(tmp_path / "model")
    sizes = {}
    for layers in ("last", "all"):
        output = tmp_path / "new" / f"{layers}.png"
        arguments = ("--model", tmp_path / "model", "--image", picture, "--image-size", 64, "--threshold", 0)
        code, text = run(*arguments, "--top", 2, "--layers", layers, "--output", output)
        assert code == 0, text
        assert "2 in detail" in text
        sizes[layers] = Image.open(output).size
    assert sizes["all"][0] == sizes["last"][0]
    assert sizes["all"][1] > 2 * sizes["last"][1]  # three times the rows, under the same headings


def test_what_cannot_be_shown_is_said(picture: Path, tmp_path: Path) -> None:
    host = ROWS["rt-detr"]
    wrapped(host).save_pretrained(tmp_path / "model")
    build(host).save_pretrained(tmp_path / "bare")
    no_image = tmp_path / "image.txt"
    no_image.write_text("text")
    for arguments, code, text in [
        (
            ("--model", tmp_path, "--image", picture),
            2,
            "there is neither a config.json (transformers) nor",
        ),
        (("--model", tmp_path / "bare", "--image", picture), 2, "is not wrapped: its boxes come from no distributions"),
        (("--model", tmp_path / "model", "--image", no_image), 2, "cannot identify image file"),
        (("--model", tmp_path / "model", "--image", tmp_path / "no.png"), 2, "does not exist"),
        (("--model", tmp_path / "model", "--image", picture, "--threshold", 1), 1, "no detection reaches a score of 1"),
    ]:
        found, output = run(*arguments, "--output", tmp_path / "picture.png")
        assert found == code, output
        assert text in output
    assert not (tmp_path / "picture.png").exists()


def test_detections_are_the_models_own_best_first() -> None:
    logits, boxes, record = predict_distributions(wrapped(ROWS["rt-detr"]), images(1))
    expected = []
    for scores, box in zip(logits[0].sigmoid().tolist(), boxes[0].tolist(), strict=True):
        cx, cy, w, h = (side * length for side, length in zip(box, SIZE * 2, strict=True))
        edges = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        expected.append((max(scores), ("a", "b", "class 2")[scores.index(max(scores))], edges))
    found = read_detections(logits, record, {0: "a", 1: "b"}, SIZE)
    assert "class 2" in {detection.name for detection in found}
    for detection, (score, name, edges) in zip(found, sorted(expected, reverse=True), strict=True):
        assert detection.name == name
        torch.testing.assert_close(detection.score, score)
        torch.testing.assert_close(detection.layers[-1].edges.tolist(), edges, atol=1e-3, rtol=1e-5)


def test_the_picture_shows_the_numbers() -> None:
    logits, _, record = predict_distributions(wrapped(ROWS["rt-detr"]), images(1))
    found = read_detections(logits, record, dict(enumerate("abc")), SIZE)
    figure = draw_detections(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), found, detailed=2, all_layers=True)
    whole, *parts = figure.axes
    assert len(parts) == 2 * NUM_LAYERS * (1 + 2 * 4)
    assert whole.get_xlim() == (-0.5, SIZE[0] - 0.5)

    layer = found[0].layers[0]
    crop, *edges = parts[:9]
    bands = [patch for patch in crop.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    x0, y0, x1, y1 = layer.edges.tolist()
    for edge, (band, std) in enumerate(zip(bands, layer.deviations.tolist(), strict=True)):
        middle = (x0, y0, x1, y1)[edge]
        (left, top), (right, bottom) = (
            band.get_xy(),
            (band.get_x() + band.get_width(), band.get_y() + band.get_height()),
        )
        across, along = ((left, right), (top, bottom)) if edge % 2 == 0 else ((top, bottom), (left, right))
        torch.testing.assert_close(across, (middle - std, middle + std))
        torch.testing.assert_close(along, (y0, y1) if edge % 2 == 0 else (x0, x1))
    (initial,) = (patch for patch in crop.patches if isinstance(patch, Rectangle) and not patch.get_fill())
    torch.testing.assert_close([initial.get_x(), initial.get_y()], layer.initial_edges[:2].tolist())
    for edge in range(4):
        before, after = edges[2 * edge], edges[2 * edge + 1]
        torch.testing.assert_close([bar.get_height() for bar in before.patches], layer.probabilities[edge].tolist())
        x, y = after.lines[-1].get_data()
        torch.testing.assert_close(x.tolist(), layer.offsets[edge].tolist())
        torch.testing.assert_close(y.tolist(), layer.probabilities[edge].tolist())
