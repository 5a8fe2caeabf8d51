"""Photos of published data sets as folders in COCO's format."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dfine_plugin.benchmarks.data.coco_data import read_split
from dfine_plugin.benchmarks.photos import app, tile_corners

VOC = """<annotation><size><width>40</width><height>20</height></size>
<object><name>dent</name><bndbox><xmin>{left}</xmin><ymin>1</ymin><xmax>{right}</xmax><ymax>20</ymax></bndbox></object>
</annotation>"""


def run(*arguments: Path | str) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: Path | str) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def voc(tmp_path: Path) -> tuple[Path, Path]:
    """Seven grey photos with a box each, whose first pixels, as VOC counts, are 1 to 7; and one without an XML file."""
    images, annotations = tmp_path / "IMAGES", tmp_path / "ANNOTATIONS"
    images.mkdir()
    annotations.mkdir()
    for number in range(8):
        Image.new("L", (40, 20), number).save(images / f"{number}.png")
    for number in range(7):
        (annotations / f"{number}.xml").write_text(VOC.format(left=number + 1, right=number + 8))
    return images, annotations


def test_voc_boxes_lose_nothing(voc: tuple[Path, Path], tmp_path: Path) -> None:
    """VOC counts pixels from 1 and has the last one in the box: 1 to 8 are eight pixels, from the image's edge on."""
    assert run("voc", *voc, "--output", tmp_path / "coco") == "train: 5 images, 5 objects\nval: 2 images, 2 objects\n"
    train, val = (read_split(tmp_path / "coco", split, 20, 40) for split in ("train", "val"))
    assert [image[0, 0, 0].item() for image in (*val.images, *train.images)] == [0, 5, 1, 2, 3, 4, 6]
    left = [(box[0, 0] - box[0, 2] / 2).item() * 40 for box in (*val.boxes, *train.boxes)]
    assert left == pytest.approx([0, 5, 1, 2, 3, 4, 6], abs=1e-4)
    assert all(box[0, 2:].tolist() == pytest.approx([8 / 40, 1]) for box in (*val.boxes, *train.boxes))
    assert train.class_names == ["dent"]


def test_boxes_of_tiles_are_those_of_the_masks_seen_there(tmp_path: Path) -> None:
    """Each pixel of a tile that a mask covers lies in a box, and each side of a box touches its mask or the edge."""
    rng = np.random.default_rng(0)
    side, shape = 32, (70, 100)
    for photo in ("a", "b"):
        for kind in ("images", "masks"):
            (tmp_path / "photos" / photo / kind).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (*shape, 4), dtype=np.uint8)).save(
            tmp_path / "photos" / photo / "images" / "x.png"
        )
        y, x = np.mgrid[: shape[0], : shape[1]]
        for number in range(6):
            centre, radius = rng.uniform((5, 5), (65, 95)), rng.uniform(5, 14)
            mask = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "photos" / photo / "masks" / f"{number}.png")
    run("tiles", tmp_path / "photos", "--output", tmp_path / "coco", "--side", side, "--name", "cell")

    seen = 0
    for split, photo in (("val", "a"), ("train", "b")):
        content = json.loads((tmp_path / "coco" / f"instances_{split}.json").read_text())
        masks = [np.asarray(Image.open(tmp_path / "photos" / photo / "masks" / f"{i}.png")) > 0 for i in range(6)]
        whole = np.asarray(Image.open(tmp_path / "photos" / photo / "images" / "x.png").convert("RGB"))
        for image in content["images"]:
            top, left = tile_corners(*shape, side)[int(image["file_name"].removesuffix(".png").rpartition("-")[2])]
            tile = np.asarray(Image.open(tmp_path / "coco" / "images" / image["file_name"]))
            assert (tile == whole[top : top + side, left : left + side]).all()
            found = sorted(a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"])
            expected = []
            for mask in masks:
                rows = [y for y in range(side) if any(mask[top + y, left + x] for x in range(side))]
                columns = [x for x in range(side) if any(mask[top + y, left + x] for y in range(side))]
                if len(rows) and min(rows[-1] - rows[0], columns[-1] - columns[0]) >= 3:
                    expected.append([columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1])
            assert found == sorted(expected)
            seen += len(found)
    assert seen > 10


def test_tiles_do_not_overlap_and_stay_inside() -> None:
    for height, width in ((96, 96), (256, 320), (1024, 1024), (520, 696), (95, 400)):
        corners = tile_corners(height, width, 96)
        assert len(corners) == min(6, (height // 96) * (width // 96))
        covered = np.zeros((height, width), dtype=int)
        for top, left in corners:
            assert covered[top : top + 96, left : left + 96].shape == (96, 96)
            covered[top : top + 96, left : left + 96] += 1
        assert covered.max(initial=0) <= 1


def test_bad_input_is_refused_with_its_reason(voc: tuple[Path, Path], tmp_path: Path) -> None:
    images, annotations = voc
    assert "has the name of an image in" in refused("voc", images, images, "--output", tmp_path / "new")
    assert "no folder there has a folder masks" in refused("tiles", images, "--output", tmp_path / "new")
    assert "exists" in refused("voc", images, annotations, "--output", images)
    for broken in ("<annotation>", "<annotation/>", VOC.format(left="", right=3)):
        (annotations / "3.xml").write_text(broken)
        assert "is no annotation of Pascal VOC" in refused("voc", images, annotations, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()
