"""Fine-tune a DETR of transformers, wrapped, on a data set of your own: calibrate, train, save, load, measure, predict.

    pip install ".[bench]" supervision torchmetrics
    python examples/fine_tune.py my-data  # in COCO's format: images/, instances_train.json, instances_val.json
    python examples/fine_tune.py my-data --host benchmarks/trained/rt-detr  # nothing is downloaded; tiny, 96 px

docs/fine-tune.md walks through it.
"""

import math
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import supervision
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

from dfine_plugin import FDRConfig, calibrate, load_pretrained, wrap_decoder

CALIBRATION_IMAGES = 128
MANY_QUERIES = 100  # so many, and FGL did not delay a rare new class as it does with 30
METRICS = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


# --8<-- [start:data]
class CocoSplit(Dataset):
    """One split of a folder: pixels and labels as the host takes them. Classes go in the order of their ids."""

    def __init__(self, folder: Path, split: str, processor: Any) -> None:
        self.raw = CocoDetection(folder / "images", str(folder / f"instances_{split}.json"))
        self.processor = processor
        self.labels = {category: label for label, category in enumerate(sorted(self.raw.coco.cats))}
        self.names = {label: self.raw.coco.cats[category]["name"] for category, label in self.labels.items()}

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, found = self.raw[index]
        labelled = [{**known, "category_id": self.labels[known["category_id"]], "area": 0} for known in found]
        annotations = {"image_id": index, "annotations": labelled}  # crowds are left out, boxes cut at the borders
        inputs = self.processor(picture, annotations=annotations, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0]}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


# --8<-- [end:data]


def load_processor(host: str) -> Any:
    """What makes pixels of pictures."""
    try:
        processor = AutoImageProcessor.from_pretrained(host)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--host") from error
    if "height" not in processor.size:
        raise typer.BadParameter(f"{host} takes images of many sizes; batches are stacked here", param_hint="--host")
    return processor


# --8<-- [start:host]
def load_host(host: str, names: dict[int, str]) -> nn.Module:
    """The trained host, with new class heads if its classes are others."""
    return AutoModelForObjectDetection.from_pretrained(
        host,
        id2label=names,
        label2id={name: label for label, name in names.items()},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def choose_config(host: str, names: dict[int, str]) -> FDRConfig:
    """The default; but where several classes are new to a host of few queries, FGL's gradient, which delays a rare one
    there, stays in the FDR head."""
    config = AutoConfig.from_pretrained(host)
    if config.id2label == names or len(names) == 1 or config.num_queries >= MANY_QUERIES:
        return FDRConfig()
    return FDRConfig(distribution_losses_train="head")


def wrap(model: nn.Module, data: CocoSplit, batch_size: int, config: FDRConfig) -> None:
    """Wrap the host, and keep its boxes."""
    wrap_decoder(model, config)
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=collate)
    batches = islice(loader, math.ceil(CALIBRATION_IMAGES / batch_size))
    print(calibrate(model, (batch["pixel_values"] for batch in batches)))


# --8<-- [end:host]
# --8<-- [start:train]
def train(model: nn.Module, data: CocoSplit, output: Path, trainer: type[Trainer] = Trainer, **schedule: Any) -> None:
    arguments = TrainingArguments(
        str(output), warmup_steps=0.05, max_grad_norm=0.1, remove_unused_columns=False, save_strategy="no", **schedule
    )
    trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()


# --8<-- [end:train]
# --8<-- [start:evaluate]
@torch.no_grad()
def detect(model: nn.Module, processor: Any, picture: Image.Image, threshold: float) -> dict[str, Tensor]:
    """Scores (n,), labels (n,) and boxes (n, 4) as x0, y0, x1, y1 in pixels of the picture."""
    inputs = processor(picture, return_tensors="pt").to(model.device)
    sides = [(picture.height, picture.width)]
    (found,) = processor.post_process_object_detection(model(**inputs), threshold=threshold, target_sizes=sides)
    return {name: values.cpu() for name, values in found.items()}


def evaluate(model: nn.Module, data: CocoSplit) -> str:
    """AP by COCO's rules, in percent."""
    metric = MeanAveragePrecision(backend="pycocotools")
    metric.warn_on_many_detections = False  # of an image the best 100 count
    for picture, annotations in data.raw:
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        labels = [data.labels[annotation["category_id"]] for annotation in annotations]
        crowds = [annotation.get("iscrowd", 0) for annotation in annotations]
        truth = {
            "boxes": box_convert(boxes, "xywh", "xyxy"),
            "labels": torch.tensor(labels, dtype=torch.long),
            "iscrowd": torch.tensor(crowds, dtype=torch.long),
        }
        metric.update([detect(model, data.processor, picture, threshold=0.0)], [truth])
    found = metric.compute()
    return ", ".join(f"{name} {100 * float(found[key]):.2f}" for name, key in METRICS.items())


# --8<-- [end:evaluate]
# --8<-- [start:predict]
def draw(model: nn.Module, processor: Any, picture: Image.Image, threshold: float = 0.5) -> Image.Image:
    """The picture with what the model finds in it."""
    found = detect(model, processor, picture, threshold)
    detections = supervision.Detections.from_transformers(found, id2label=model.config.id2label)
    for annotator in (supervision.BoxAnnotator(), supervision.LabelAnnotator()):
        picture = annotator.annotate(picture, detections)
    return picture


# --8<-- [end:predict]


def check_folder(folder: Path) -> Path:
    parts = ("images", "instances_train.json", "instances_val.json")
    if missing := [part for part in parts if not (folder / part).exists()]:
        raise typer.BadParameter(f"{folder} has no {' and no '.join(missing)}")
    return folder


def main(
    folder: Annotated[Path, typer.Argument(help="of the data, in COCO's format", callback=check_folder)],
    host: Annotated[str, typer.Option(help="a name on the hub, or a folder")] = "PekingU/rtdetr_r50vd",
    output: Annotated[Path, typer.Option(help="folder of the model")] = Path("wrapped"),
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-4,
) -> None:
    """Fine-tune a wrapped host, and write it, and a picture of what it finds, to a folder."""
    # --8<-- [start:main]
    processor = load_processor(host)
    train_data, val_data = (CocoSplit(folder, split, processor) for split in ("train", "val"))
    model = load_host(host, train_data.names)
    wrap(model, train_data, batch_size, choose_config(host, train_data.names))
    schedule = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    train(model, train_data, output, **schedule)
    model.save_pretrained(output)
    processor.save_pretrained(output)

    model = load_pretrained(output).to(model.device)
    print(evaluate(model, val_data))
    picture, _ = val_data.raw[0]
    draw(model, processor, picture).save(output / "predictions.png")
    # --8<-- [end:main]


if __name__ == "__main__":
    typer.run(main)
