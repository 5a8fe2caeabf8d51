"""Any data set in COCO format as training and validation data of one image size, held in memory.

The folder has `instances_train.json`, `instances_val.json` and `images/`. A split is opened by its name alone: a test
split beside them stays unseen unless it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfine_plugin.benchmarks.data.detection_data import DetectionData
from dfine_plugin.errors import first_line


def read_split(folder: Path, split: str, height: int, width: int) -> DetectionData:
    """The `split` ("train", "val", "test") of the data set in `folder`, its images scaled to `height` x `width`.

    Crowd regions are no training targets, but stay in the ground truth, where COCO's rules ignore what they hold.
    Images without annotations stay, too. Boxes are cut at the image's edge; those left without area are dropped.
    Evaluation is in pixels of the original images.

    Raises:
        FileNotFoundError: the folder has no such split.
        ValueError: what it has is not in COCO's format, or an image cannot be read.
    """
    path = folder / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: --data takes 'shapes' or a folder with instances_train.json, "
            "instances_val.json and images/"
        )
    try:
        return _read(json.loads(path.read_text()), folder / "images", height, width)
    # whatever stumbles on a file that holds something else
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path} cannot be read as a data set in COCO's format: {reason}") from error


def _read(coco: dict[str, Any], images: Path, height: int, width: int) -> DetectionData:
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    label = {category["id"]: index for index, category in enumerate(categories)}
    truths: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in coco["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for number, annotation in enumerate(coco["annotations"]):
        annotation.setdefault("id", number + 1)
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        box = _relative_box(annotation["bbox"], *sizes[annotation["image_id"]])
        if not annotation["iscrowd"] and box[2] > 0 and box[3] > 0:
            truths[annotation["image_id"]].append((box, label[annotation["category_id"]]))
    pixels = [_read_image(images / image["file_name"], height, width) for image in coco["images"]]
    return DetectionData(
        images=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        boxes=[torch.tensor([box for box, _ in t], dtype=torch.float32).reshape(-1, 4) for t in truths.values()],
        labels=[torch.tensor([label for _, label in t], dtype=torch.int64) for t in truths.values()],
        coco=coco,
        image_ids=list(truths),
        category_ids=[category["id"] for category in categories],
        class_names=[category["name"] for category in categories],
    )


def _relative_box(box: list[float], width: int, height: int) -> list[float]:
    """COCO's x, y, w, h in pixels, cut at the image's edge, as cx, cy, w, h in units of the image."""
    left, right = (min(max(edge, 0.0), width) / width for edge in (box[0], box[0] + box[2]))
    top, bottom = (min(max(edge, 0.0), height) / height for edge in (box[1], box[1] + box[3]))
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _read_image(path: Path, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, whatever the file's colour mode."""
    with Image.open(path) as image:
        # `draft` lets the JPEG decoder skip what the smaller image does not need.
        image.draft("RGB", (width, height))
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0))
