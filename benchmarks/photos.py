"""Photos of published data sets as folders in COCO's format, which the benchmarks' `--data` takes.

    python -m dfine_plugin.benchmarks.photos voc IMAGES ANNOTATIONS --output neu-det
    python -m dfine_plugin.benchmarks.photos tiles stage1_train --output nuclei

`voc` reads Pascal VOC's XML files, one for each image; `tiles` cuts photos whose objects have a mask each, in folders
as the Data Science Bowl of 2018 has them, into tiles, and boxes what is seen of each mask there. Every fifth photo, by
name, is for validation.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer

from dfine_plugin.benchmarks.reporting import write_json

if TYPE_CHECKING:
    import numpy as np

VAL_EVERY = 5
TILES_OF_A_PHOTO = 6
MIN_SIDE = 4
"""Pixels that a tile must show of an object in both directions for it to count."""

FOLDER = {"exists": True, "file_okay": False}
OutputOption = Annotated[Path, typer.Option(file_okay=False, help="the folder to write; it must not exist yet")]

app = typer.Typer(help=(__doc__ or "").split("\n\n")[0], add_completion=False)


class CocoFolder:
    """Writes `instances_train.json`, `instances_val.json` and `images/`; ids count from 1."""

    def __init__(self, folder: Path, classes: list[str]) -> None:
        if folder.exists():
            raise typer.BadParameter(f"{folder} exists", param_hint="--output")
        self.folder = folder
        self.ids = {name: number for number, name in enumerate(classes, start=1)}
        self.splits: dict[str, dict[str, list[dict[str, Any]]]] = {
            split: {"images": [], "annotations": []} for split in ("train", "val")
        }
        (folder / "images").mkdir(parents=True)

    def add(self, photo: int, file_name: str, size: tuple[int, int], objects: list[tuple[str, list[float]]]) -> Path:
        """Note an image of the photo of this number, its (width, height) and objects (class, x, y, w, h in pixels).

        Returns where the image belongs.
        """
        split = self.splits["train" if photo % VAL_EVERY else "val"]
        number = len(split["images"]) + 1
        split["images"].append({"id": number, "file_name": file_name, "width": size[0], "height": size[1]})
        for name, box in objects:
            split["annotations"].append(
                {
                    "id": len(split["annotations"]) + 1,
                    "image_id": number,
                    "category_id": self.ids[name],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        return self.folder / "images" / file_name

    def write(self) -> None:
        """Write both splits, and print what they hold."""
        categories = [{"id": number, "name": name} for name, number in self.ids.items()]
        for name, split in self.splits.items():
            write_json(self.folder / f"instances_{name}.json", {"info": {}, **split, "categories": categories})
            typer.echo(f"{name}: {len(split['images'])} images, {len(split['annotations'])} objects")


def read_voc(path: Path) -> tuple[tuple[int, int], list[tuple[str, list[float]]]]:
    """An image's (width, height) and its objects, from Pascal VOC's XML, whose pixels count from 1, the last included.

    Raises:
        ValueError: it is something else.
    """
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}") or "") for side in ("width", "height"))
        objects = []
        for node in root.iter("object"):
            left, top, right, bottom = (
                float(node.findtext(f"bndbox/{edge}") or "") for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            objects.append((node.findtext("name") or "", [left - 1, top - 1, right - left + 1, bottom - top + 1]))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no annotation of Pascal VOC: {error}") from error
    return (width, height), objects


@app.command()
def voc(
    images: Annotated[Path, typer.Argument(**FOLDER)],
    annotations: Annotated[Path, typer.Argument(**FOLDER)],
    output: OutputOption = Path("photos"),
) -> None:
    """A folder of images and one of Pascal VOC's XML files, such as NEU-DET's."""
    found = {path.stem: path for path in images.iterdir()}
    paths = [path for path in sorted(annotations.glob("*.xml")) if path.stem in found]
    if not paths:
        raise typer.BadParameter(f"no XML file there has the name of an image in {images}", param_hint="ANNOTATIONS")
    try:
        read = [read_voc(path) for path in paths]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="ANNOTATIONS") from error
    coco = CocoFolder(output, sorted({name for _, objects in read for name, _ in objects}))
    for photo, (path, (size, objects)) in enumerate(zip(paths, read, strict=True)):
        image = found[path.stem]
        shutil.copyfile(image, coco.add(photo, image.name, size, objects))
    coco.write()


def tile_corners(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """The (top, left) corners of the tiles of a photo: a grid in its middle, thinned evenly to a few."""
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    corners = [(top + row * side, left + column * side) for row in range(rows) for column in range(columns)]
    count = min(len(corners), TILES_OF_A_PHOTO)
    return [corners[i * len(corners) // count] for i in range(count)]


def boxes_in_tile(masks: np.ndarray, top: int, left: int, side: int) -> list[list[float]]:
    """Of the masks ``(n, height, width)`` the boxes x, y, w, h of what the tile shows of each, but for slivers."""
    import numpy as np
    from pycocotools import mask as coco_mask

    seen = masks[:, top : top + side, left : left + side].transpose(1, 2, 0)
    boxes = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(seen, dtype=np.uint8)))
    return [box for box in boxes.tolist() if min(box[2:]) >= MIN_SIDE]


@app.command()
def tiles(
    photos: Annotated[Path, typer.Argument(**FOLDER)],
    output: OutputOption = Path("photos"),
    side: Annotated[int, typer.Option(min=32, help="of a tile, in pixels")] = 96,
    most: Annotated[int, typer.Option(min=1, help="objects that a tile may show; others are left out")] = 25,
    name: Annotated[str, typer.Option(help="of the one class")] = "nucleus",
) -> None:
    """Photos with a mask for each object, ID/images/*.png and ID/masks/*.png, such as the nuclei of stage1_train."""
    import numpy as np
    from PIL import Image

    folders = [folder for folder in sorted(photos.iterdir()) if (folder / "masks").is_dir()]
    if not folders:
        raise typer.BadParameter("no folder there has a folder masks", param_hint="PHOTOS")
    coco = CocoFolder(output, [name])
    for photo, folder in enumerate(folders):
        with Image.open(next((folder / "images").iterdir())) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        paths = sorted((folder / "masks").iterdir())
        masks = np.stack([np.asarray(Image.open(path).convert("L")) > 0 for path in paths])
        height, width = pixels.shape[:2]
        for number, (top, left) in enumerate(tile_corners(height, width, side)):
            objects = [(name, box) for box in boxes_in_tile(masks, top, left, side)]
            if 0 < len(objects) <= most:
                path = coco.add(photo, f"{folder.name}-{number}.png", (side, side), objects)
                Image.fromarray(pixels[top : top + side, left : left + side]).save(path)
    coco.write()


if __name__ == "__main__":
    app()
