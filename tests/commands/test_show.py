"""The command `show` from end to end, and what its picture says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from PIL import Image
from transformers import RTDetrImageProcessor
from typer.testing import CliRunner

from dfine_plugin import FDRConfig
from dfine_plugin.distributions import edge_distributions
from dfine_plugin.tools.commands import app
from dfine_plugin.tools.show import COLOURS, Detection, draw_detections, read_detections
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
    for layers, dpi in (("last", 100), ("all", 100), ("last", 150)):
        output = tmp_path / "new" / f"{layers}.png"
        arguments = ("--model", tmp_path / "model", "--image", picture, "--image-size", 64, "--threshold", 0)
        code, text = run(*arguments, "--top", 2, "--layers", layers, "--dpi", dpi, "--output", output)
        assert code == 0, text
        assert "2 in detail" in text
        detailed = [line for line in text.splitlines() if line.count(" ± ") == 4]
        assert [line.split()[0] for line in detailed] == ["1", "2"]
        sizes[layers, dpi] = Image.open(output).size
    assert sizes["all", 100][0] == sizes["last", 100][0]
    assert sizes["all", 100][1] > 2 * sizes["last", 100][1]  # three times the rows, under the same headings
    assert sizes["last", 150] == pytest.approx([1.5 * side for side in sizes["last", 100]], abs=1)


def test_what_is_taken_for_granted_of_images_is_said(picture: Path, tmp_path: Path) -> None:
    wrapped(ROWS["rt-detr"]).save_pretrained(tmp_path / "model")
    call = ("--model", tmp_path / "model", "--image", picture, "--image-size", 64, "--threshold", 0)
    _, text = run(*call, "--output", tmp_path / "picture.png")
    assert "there is no preprocessor_config.json in" in text
    RTDetrImageProcessor().save_pretrained(tmp_path / "model")
    _, text = run(*call, "--output", tmp_path / "picture.png")
    assert "preprocessor_config" not in text


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


def test_a_detection_says_where_its_edges_lie() -> None:
    """A coin between bin 16, whose offset is 0, and bin 17: mean and deviation are half the latter's offset."""
    logits = torch.full((4, 33), -torch.inf)
    logits[:, [16, 17]] = 0
    box = detection((0.5, 0.5, 0.5, 0.5), logits)
    step = float(FDRConfig().bin_values()[17])
    x, y = SIZE[0] / 2 * step / 2, SIZE[1] / 2 * step / 2
    horizontal, vertical = f"{30 - x:.1f} ± {x:.1f}", f"{20 - y:.1f} ± {y:.1f}"
    edges = f"left {horizontal}, top {vertical}, right {90 + x:.1f} ± {x:.1f}, bottom {60 + y:.1f} ± {y:.1f}"
    assert str(box) == f"a 0.50: {edges} px"


def test_the_picture_shows_the_numbers() -> None:
    logits, _, record = predict_distributions(wrapped(ROWS["rt-detr"]), images(1))
    found = read_detections(logits, record, dict(enumerate("abc")), SIZE)
    figure = draw_detections(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), found, detailed=2, all_layers=True)
    whole, *parts = figure.axes
    assert len(parts) == 2 * NUM_LAYERS * (1 + 2 * 4)
    assert whole.get_xlim() == (-0.5, SIZE[0] - 0.5)

    layer = found[0].layers[0]
    crop, *edges = parts[:9]
    bands = [patch for patch in crop.patches if isinstance(patch, Polygon)]
    for edge, (band, std) in enumerate(zip(bands, layer.deviations.tolist(), strict=True)):
        middle = float(layer.edges[edge])
        across = band.get_xy()[:, edge % 2]
        torch.testing.assert_close((across.min(), across.max()), (middle - std, middle + std))
    (initial,) = (patch for patch in crop.patches if isinstance(patch, Rectangle) and not patch.get_fill())
    torch.testing.assert_close([initial.get_x(), initial.get_y()], layer.initial_edges[:2].tolist())
    for edge in range(4):
        before, after = edges[2 * edge], edges[2 * edge + 1]
        torch.testing.assert_close([bar.get_height() for bar in before.patches], layer.probabilities[edge].tolist())
        x, y = after.lines[-1].get_data()
        torch.testing.assert_close(x.tolist(), layer.offsets[edge].tolist())
        torch.testing.assert_close(y.tolist(), layer.probabilities[edge].tolist())


def detection(box: tuple[float, ...], bins: torch.Tensor, name: str = "a") -> Detection:
    """One whose four edges have the distributions of these logits, ``(4, 33)``."""
    layer = edge_distributions(torch.tensor(box), bins, FDRConfig().bin_values(), SIZE)
    return Detection(name, 0.5, [layer])


def test_bands_of_flat_distributions_do_not_overlap() -> None:
    unsure = torch.zeros(4, 33)
    unsure[:2, [0, -1]] = 9  # left and top may be anywhere, but where they are
    points = np.random.default_rng(0).uniform((0, 0), SIZE, (10_000, 2))
    for bins in (torch.zeros(4, 33), unsure):
        flat = detection((0.5, 0.5, 0.3, 0.4), bins)
        whole, *_ = draw_detections(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), [flat]).axes
        bands = [patch.get_path() for patch in whole.patches if isinstance(patch, Polygon)]
        assert len(bands) == 4
        inside = np.stack([band.contains_points(points) for band in bands])
        assert inside.any(1).all()
        assert inside.sum(0).max() == 1


def test_labels_lie_in_the_image() -> None:
    corners = [(0.1, 0.1, 0.2, 0.2), (0.95, 0.05, 0.1, 0.1), (1.0, 1.0, 0.1, 0.1), (0.0, 0.5, 0.3, 0.3)]
    found = [detection(box, torch.zeros(4, 33), "a name of some length") for box in corners]
    for shape in ((80, 120), (120, 80)):
        figure = draw_detections(np.zeros((*shape, 3), np.uint8), found, detailed=4)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        whole = figure.axes[0]
        frame = whole.get_window_extent()
        assert max(frame.width, frame.height) / figure.dpi > 5.5
        for label in whole.texts:
            extent = label.get_window_extent()
            assert frame.x0 - 1 <= extent.x0 < extent.x1 <= frame.x1 + 1
            assert frame.y0 - 1 <= extent.y0 < extent.y1 <= frame.y1 + 1


def test_the_legend_shows_what_is_drawn_as_it_is_drawn() -> None:
    found = [detection((0.5, 0.5, 0.3, 0.4), torch.zeros(4, 33))] * 2
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    said = {}
    for detailed in (1, 2):
        (legend,) = draw_detections(image, found, detailed=detailed).findobj(Legend)
        said[detailed] = [text.get_text() for text in legend.get_texts()]
    assert said[1][:3] == said[2]
    assert said[1][3] == "other detections"
    colours = [line.get_color() for line in legend.findobj(Line2D)]
    assert [colour for colour in colours if colour in COLOURS] == list(COLOURS)
    bands = [to_hex(patch.get_facecolor()).upper() for patch in legend.findobj(Rectangle)]
    assert bands == list(COLOURS)
    columns = {axes.get_ylabel() for axes in draw_detections(image, found).axes}
    assert {"before W", "after W"} <= columns
