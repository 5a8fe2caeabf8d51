"""RT-DETR of Hugging Face transformers as a detectron2 meta-architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

LARGEST_STRIDE = 32
"""Sides must be multiples of it: the encoder adds feature maps to the doubled ones of the next stride."""

# What distinguishes the published sizes from transformers' default, which is R50.
_SIZES: dict[int, dict[str, Any]] = {
    18: {
        "backbone": {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
    },
    34: {
        "backbone": {"depths": [3, 4, 6, 3], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 4,
    },
    50: {"backbone": {"depths": [3, 4, 6, 3]}},
    101: {
        "backbone": {"depths": [3, 4, 23, 3]},
        "encoder_hidden_dim": 384,
        "encoder_ffn_dim": 2048,
        "decoder_in_channels": [384, 384, 384],
    },
}


def rt_detr(
    depth: int = 50,
    num_classes: int = 80,
    pretrained: str = "",
    backbone: Mapping[str, Any] | None = None,
    **changes: Any,
) -> RTDetrForObjectDetection:
    """RT-DETR with a ResNet of 18, 34, 50 or 101 layers.

    Args:
        depth: of the backbone; the other sizes follow it as in RT-DETR's paper.
        num_classes: of the data. Class heads of a checkpoint of another number are drawn anew.
        pretrained: a folder with a transformers checkpoint (``PekingU/rtdetr_r18vd``, say); its own config then holds,
            and ``depth`` is not asked. Empty for random weights.
        backbone: further settings of ``RTDetrResNetConfig``.
        changes: further settings of ``RTDetrConfig``.

    Raises:
        ValueError: for a depth that RT-DETR does not come in.
        FileNotFoundError: if ``pretrained`` is no folder.
    """
    changes = {"num_labels": num_classes, **_plain(changes)}
    if pretrained:
        if not Path(pretrained).is_dir():
            raise FileNotFoundError(f"no folder {pretrained!r} with a transformers checkpoint of RT-DETR")
        return RTDetrForObjectDetection.from_pretrained(pretrained, ignore_mismatched_sizes=True, **changes)
    if depth not in _SIZES:
        raise ValueError(f"RT-DETR comes with a ResNet of {', '.join(map(str, _SIZES))} layers, not {depth}")
    size = dict(_SIZES[depth])
    layers = {**size.pop("backbone"), "out_features": ["stage2", "stage3", "stage4"], **_plain(backbone or {})}
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=RTDetrResNetConfig(**layers), **{**size, **changes}))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with lists in place of the ListConfigs that a LazyConfig makes of them: transformers checks types."""
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in settings.items()}


class RTDETR(nn.Module):
    """A detectron2 model around an RT-DETR of transformers: ``batched_inputs`` in, losses or ``Instances`` out.

    Images are padded at the right and below, to one size that the strides divide; boxes are relative to the padded
    size, which is what the detector sees. The detector takes pixels in ``[0, 1]``, in the order red, green, blue.

    Args:
        detector: an ``RTDetrForObjectDetection``, wrapped or not. Its loss dict holds weighted terms: detrex's trainer,
            which adds all of them up, trains on the detector's own loss.
        select_box_nums_for_evaluation: how many boxes an image gets, by score over all queries and classes.
        device: where inputs go.
    """

    def __init__(
        self, detector: RTDetrForObjectDetection, select_box_nums_for_evaluation: int = 300, device: str = "cuda"
    ) -> None:
        super().__init__()
        self.detector = detector
        self.select_box_nums_for_evaluation = select_box_nums_for_evaluation
        self.device = device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Weighted losses by name in training, for each image ``{"instances": Instances}`` in evaluation.

        Args:
            batched_inputs: dicts of ``image`` (3, H, W) in 0 to 255; in training ``instances`` with ``gt_boxes`` and
                ``gt_classes``; in evaluation ``height`` and ``width`` of the result, by default the image's.
        """
        images = ImageList.from_tensors(
            [entry["image"].to(self.device) for entry in batched_inputs], size_divisibility=LARGEST_STRIDE
        )
        pixels = images.tensor.float() / 255
        if self.training:
            labels = [self._labels(entry["instances"].to(self.device), pixels) for entry in batched_inputs]
            return self.detector(pixel_values=pixels, labels=labels).loss_dict
        outputs = self.detector(pixel_values=pixels)
        results = self._instances(outputs.logits, outputs.pred_boxes, images)
        return [
            {"instances": detector_postprocess(result, entry.get("height", size[0]), entry.get("width", size[1]))}
            for result, entry, size in zip(results, batched_inputs, images.image_sizes, strict=True)
        ]

    def _labels(self, instances: Instances, pixels: Tensor) -> dict[str, Tensor]:
        corners = instances.gt_boxes.tensor / _sides(pixels)
        return {"class_labels": instances.gt_classes, "boxes": box_convert(corners, "xyxy", "cxcywh")}

    def _instances(self, logits: Tensor, boxes: Tensor, images: ImageList) -> list[Instances]:
        num_classes = logits.shape[-1]
        count = min(self.select_box_nums_for_evaluation, logits.shape[1] * num_classes)
        scores, indices = logits.float().sigmoid().flatten(1).topk(count, dim=1)
        corners = box_convert(boxes, "cxcywh", "xyxy") * _sides(images.tensor)
        results = []
        for image, image_size in enumerate(images.image_sizes):
            result = Instances(image_size)
            result.pred_boxes = Boxes(corners[image, indices[image] // num_classes])
            result.scores, result.pred_classes = scores[image], indices[image] % num_classes
            results.append(result)
        return results


def _sides(pixels: Tensor) -> Tensor:
    """Width and height of a batch, twice: what relative corners are multiplied by."""
    height, width = pixels.shape[-2:]
    return torch.tensor([width, height, width, height], dtype=torch.float32, device=pixels.device)
