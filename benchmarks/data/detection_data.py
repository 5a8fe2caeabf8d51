"""A detection data set held in memory, its training view and its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# Sides (in pixels of the evaluated image) between small and medium, and between medium and large objects in COCO.
COCO_SIDES = (32.0, 96.0)


@dataclass(frozen=True)
class DetectionData:
    """Images with their boxes, N images of one size.

    images: (N, 3, H, W) uint8. boxes: per image (M, 4) float32, `(cx, cy, w, h)` in units of the image side.
    labels: per image (M,) int64, 0-based. coco: the ground truth as a COCO annotation dict, whose image ids are
    `image_ids` (N,), whose category ids are `category_ids[label]`, and whose boxes are in pixels of the original image.
    sides: the object sides that part APs from APm and APm from APl, in the same pixels.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    coco: dict[str, Any]
    image_ids: list[int]
    category_ids: list[int]
    class_names: list[str]
    sides: tuple[float, float] = COCO_SIDES

    def __len__(self) -> int:
        return len(self.images)

    def original_sizes(self) -> Tensor:
        """(N, 4) float32: width, height, width, height of each original image, to carry boxes to its pixels."""
        size = {image["id"]: (image["width"], image["height"]) for image in self.coco["images"]}
        return torch.tensor([size[i] * 2 for i in self.image_ids], dtype=torch.float32)


class TrainingView(Dataset[dict[str, Any]]):
    """The samples of `data` as a map-style data set; with `flip`, each is mirrored with probability 1/2.

    The flips come from a generator of its own, so that two models which draw different amounts of random numbers
    still see the same images.
    """

    def __init__(self, data: DetectionData, flip: bool, seed: int) -> None:
        self.data = data
        self.flip = flip
        self.random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, boxes = self.data.images[index], self.data.boxes[index]
        if self.flip and self.random.random() < 0.5:
            image = image.flip(-1)
            boxes = boxes.clone()
            boxes[:, 0] = 1 - boxes[:, 0]
        return {"image": image, "boxes": boxes, "class_labels": self.data.labels[index]}


def normalise(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) as float32 in -1 .. 1."""
    return images.float().div_(127.5).sub_(1)


def normalised(images: Tensor, normalisation: Mapping[str, Any]) -> Tensor:
    """RGB images (B, 3, H, W) in 0 .. 255 as a checkpoint's model takes them; float32."""
    if normalisation["channels"] == "BGR":
        images = images.flip(1)
    pixels = images.float() * normalisation["scale"]
    mean, deviation = (pixels.new_tensor(normalisation[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / deviation


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The batch that transformers' detectors take: `pixel_values` (B, 3, H, W) and a list of `labels`."""
    return {
        "pixel_values": normalise(torch.stack([sample["image"] for sample in samples])),
        "labels": [{key: sample[key] for key in ("boxes", "class_labels")} for sample in samples],
    }
