"""Reading a folder in COCO format, and its training view."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfine_plugin.benchmarks.data.coco_data import read_split
from dfine_plugin.benchmarks.data.detection_data import COCO_SIDES, TrainingView, collate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them empty and grey; a crowd, a box over the edge, and a test split nobody may open."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "images" / "b.png")
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 80, "height": 40},
            {"id": 9, "file_name": "b.png", "width": 80, "height": 40},
        ],
        "categories": [{"id": 5, "name": "cell"}, {"id": 2, "name": "dot"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [8, 4, 16, 12], "area": 192, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [60, 30, 40, 20], "area": 200, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 80, 40], "area": 3200, "iscrowd": 1},
        ],
    }
    for split in ("train", "val"):
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(content))
    (tmp_path / "instances_test.json").write_text("not JSON: reading it fails")
    return tmp_path


def test_boxes_labels_and_images(folder: Path) -> None:
    data = read_split(folder, "train", 32, 64)
    assert data.images.shape == (2, 3, 32, 64)
    expected = torch.tensor([[0.2, 0.25, 0.2, 0.3], [0.875, 0.875, 0.25, 0.25]])  # the second is cut at the edge
    assert torch.allclose(data.boxes[0], expected)
    assert data.labels[0].tolist() == [1, 0]  # category ids 5 and 2, in the order of the ids
    assert data.category_ids == [2, 5]
    assert data.class_names == ["dot", "cell"]
    assert data.boxes[1].shape == (0, 4)
    assert data.image_ids == [7, 9]
    assert data.original_sizes().tolist() == [[80, 40, 80, 40]] * 2
    assert data.sides == COCO_SIDES


def test_a_folder_without_annotations_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json not found: --data takes 'shapes' or a folder"):
        read_split(tmp_path, "val", 32, 32)


def test_flips_mirror_image_and_boxes_and_follow_the_seed(folder: Path) -> None:
    data = read_split(folder, "train", 32, 64)
    plain = TrainingView(data, flip=False, seed=0)[0]
    flipping = TrainingView(data, flip=True, seed=0)
    samples = [flipping[0] for _ in range(20)]
    mirrored = [not torch.equal(sample["image"], plain["image"]) for sample in samples]
    assert 0 < sum(mirrored) < 20
    sample = samples[mirrored.index(True)]
    assert torch.equal(sample["image"].flip(-1), plain["image"])
    assert torch.allclose(sample["boxes"][:, 0], 1 - plain["boxes"][:, 0])
    assert torch.equal(sample["boxes"][:, 1:], plain["boxes"][:, 1:])
    again = TrainingView(data, flip=True, seed=0)
    assert all(torch.equal(again[0]["image"], sample["image"]) for sample in samples)


def test_a_batch_is_what_the_hosts_take(folder: Path) -> None:
    view = TrainingView(read_split(folder, "train", 32, 64), flip=False, seed=0)
    batch = collate([view[0], view[1]])
    assert batch["pixel_values"].shape == (2, 3, 32, 64)
    assert -1 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1
    assert [set(label) for label in batch["labels"]] == [{"boxes", "class_labels"}] * 2
