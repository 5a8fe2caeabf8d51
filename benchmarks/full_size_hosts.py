"""The hosts at full size with fresh weights, for what the wrap costs, and how to make such weights see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfine_plugin import wrap_decoder
from dfine_plugin.benchmarks.detrex_hosts import CONFIGS, PixelsAndLabels
from dfine_plugin.registry import find_adapter

NUM_CLASSES = 80
HEADS = ("class_embed", "score_head", "bbox")
"""What the hosts' names of their class and box heads contain."""


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


def settled_pair(name: str, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """A host of :data:`HOSTS` and its wrapped twin, in evaluation mode, with weights whose outputs can be compared.

    As initialised they cannot: RT-DETR's neck shrinks what it is given by ten orders of magnitude, all places of an
    image look alike, all queries tie, and which of them a backend selects is chance. So batch norms take their
    statistics from images, and the weights of class heads, box heads and the FDR head are spread. The two share all the
    host's weights.

    Args:
        name: of the host.
        images: ``(B, 3, H, W)``.
    """
    torch.manual_seed(0)
    model = HOSTS[name]()
    bare: nn.Module = getattr(model, "detector", model).eval()
    adapter = find_adapter(bare)
    norms = [(module, module.momentum) for module in bare.modules() if isinstance(module, nn.BatchNorm2d)]
    _spread([parameter for name, parameter in bare.named_parameters() if any(head in name for head in HEADS)])
    for norm, _ in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        adapter.detector(bare)(images)
    for norm, momentum in norms:
        norm.eval()
        norm.momentum = momentum
    wrapped = wrap_decoder(copy.deepcopy(bare)).eval()
    _spread(list(wrapped.get_submodule(f"{adapter.decoder}.fdr").parameters()))
    return bare, wrapped


@torch.no_grad()
def _spread(parameters: list[nn.Parameter]) -> None:
    """Add noise to matrices: half of what keeps the variance of what they are given."""
    for matrix in parameters:
        if matrix.ndim > 1:
            matrix.add_(torch.randn_like(matrix), alpha=0.5 * matrix.shape[-1] ** -0.5)
