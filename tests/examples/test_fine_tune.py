"""The example of fine-tuning: what it reads, what it says of the model, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from dfine_plugin import FDRConfig, is_wrapped
from dfine_plugin.benchmarks.data.coco_data import read_split
from dfine_plugin.benchmarks.trained_hosts import TRAINED
from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.export.coco import CocoSplit
from dfine_plugin.export.parity import torch_detections

from ..coco_folder import SIDE
from .conftest import run

HOST = TRAINED / "rt-detr"


@pytest.fixture(scope="module")
def awkward(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data with what folders of one's own may have: categories in another order, crowds, boxes beyond the border,
    images without objects, and no areas."""
    folder = tmp_path_factory.mktemp("awkward") / "data"
    shutil.copytree(data, folder)
    for split in ("train", "val"):
        path = folder / f"instances_{split}.json"
        coco = json.loads(path.read_text())
        coco["categories"].reverse()
        empty, crowded, *_ = (image["id"] for image in coco["images"])
        kept = [annotation for annotation in coco["annotations"] if annotation["image_id"] != empty]
        next(annotation for annotation in kept if annotation["image_id"] == crowded)["iscrowd"] = 1
        kept[-1]["bbox"] = [-10, 20, 50, 100]
        for annotation in kept:
            del annotation["area"]
        path.write_text(json.dumps({**coco, "annotations": kept}))
    return folder


@pytest.mark.slow
def test_samples_are_what_the_benchmarks_read(examples: dict[str, ModuleType], awkward: Path) -> None:
    split = examples["fine_tune"].CocoSplit(awkward, "train", AutoImageProcessor.from_pretrained(HOST))
    expected = read_split(awkward, "train", SIDE, SIDE)
    assert list(split.names.values()) == expected.class_names
    assert len(split) == len(expected) == 8
    for index in range(len(split)):
        sample = split[index]
        torch.testing.assert_close(sample["labels"]["boxes"], expected.boxes[index])
        assert sample["labels"]["class_labels"].tolist() == expected.labels[index].tolist()
        torch.testing.assert_close(sample["pixel_values"], expected.images[index].float() / 127.5 - 1)


@pytest.mark.slow
def test_it_says_the_ap_of_the_model_that_it_leaves(
    examples: dict[str, ModuleType], awkward: Path, tmp_path: Path
) -> None:
    output = tmp_path / "wrapped"
    code, printed = run(examples["fine_tune"], awkward, "--host", HOST, "--output", output, "--steps", 2)
    assert code == 0, printed

    checkpoint, split = open_checkpoint(output), CocoSplit.read(awkward)
    model = checkpoint.load()
    assert is_wrapped(model)
    for annotation in split.coco["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    pictures = [Image.open(path) for path in split.image_paths()]
    pixels = [checkpoint.preprocess(picture)[0] for picture in pictures]
    expected = split.average_precision(torch_detections(model, pixels), (SIDE, SIDE))
    assert expected > 20
    (said,) = re.findall(r"^AP (\d+\.\d\d), AP50 ", printed, re.MULTILINE)
    assert float(said) == pytest.approx(expected, abs=0.01)
    with Image.open(output / "predictions.png") as drawn:
        assert (np.asarray(drawn) != np.asarray(pictures[0])).any()
        assert drawn.size == pictures[0].size


@pytest.mark.slow
def test_the_decoder_hears_of_fgl_unless_several_classes_are_new_to_few_queries(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    choose, config = examples["fine_tune"].choose_config, AutoConfig.from_pretrained(HOST)
    names = config.id2label
    assert choose(HOST, dict(names)) == choose(HOST, {0: "another"}) == FDRConfig()
    several = {**names, len(names): "another"}
    assert choose(HOST, several) == FDRConfig(distribution_losses_train="head")
    config.num_queries = 100
    config.save_pretrained(tmp_path)
    assert choose(str(tmp_path), several) == FDRConfig()


@pytest.mark.slow
def test_what_it_refuses(examples: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    code, printed = run(examples["fine_tune"], tmp_path)
    assert code == 2
    assert "has no images and no instances_train.json and no instances_val.json" in printed
    code, printed = run(examples["fine_tune"], data, "--host", tmp_path)
    assert code == 2
    assert "Invalid value for --host" in printed
    processor = json.loads((HOST / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "size": {"shortest_edge": SIDE}}))
    code, printed = run(examples["fine_tune"], data, "--host", tmp_path)
    assert code == 2
    assert "takes images of many sizes" in printed
