"""The embedded data as a folder in COCO's format."""

import json
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from dfine_plugin.benchmarks.data.shapes import make_shapes

SIDE = 96
"""Of the images, in pixels: what the small trained hosts take."""


def write_coco(folder: Path) -> None:
    """A data set of shapes: eight images to train on and eight to validate on."""
    (folder / "images").mkdir(parents=True)
    for seed, split in enumerate(("train", "val")):
        data = make_shapes(8, SIDE, seed=seed)
        for image, pixels in zip(data.coco["images"], data.images, strict=True):
            image["file_name"] = f"{split}-{image['id']}.png"
            to_pil_image(pixels).save(folder / "images" / image["file_name"])
        (folder / f"instances_{split}.json").write_text(json.dumps({"info": {}, **data.coco}))
