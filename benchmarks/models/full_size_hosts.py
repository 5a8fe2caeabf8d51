"""The hosts at full size with fresh weights, for what the wrap costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dfine_plugin.benchmarks.models.detrex_configs import CONFIGS

if TYPE_CHECKING:
    from torch import nn

NUM_CLASSES = 80


def _rt_detr(depth: int) -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
    sizes: dict[str, Any] = {"num_labels": NUM_CLASSES}
    if depth == 18:
        backbone |= {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
        sizes |= {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 3}
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=RTDetrResNetConfig(**backbone), **sizes))


def _deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
    sizes: dict[str, Any] = {"num_labels": NUM_CLASSES, "auxiliary_loss": True}
    sizes |= {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 300}
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=ResNetConfig(**backbone), **sizes))


def _detrex(name: str) -> nn.Module:
    """A host of detrex as its config has it."""
    from detectron2.config import instantiate

    from dfine_plugin.benchmarks.models.detrex_hosts import PixelsAndLabels
    from dfine_plugin.projects.common import detrex_config

    config = detrex_config(CONFIGS[name]).model
    config.device = "cpu"
    return PixelsAndLabels(instantiate(config))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "rt-detr-r18": partial(_rt_detr, 18),
    "rt-detr-r50": partial(_rt_detr, 50),
    "deformable-detr-r50": _deformable_detr,
    **{f"detrex/{name}": partial(_detrex, name) for name in CONFIGS},
}
