"""The rows of MMDetection. Nothing here imports it before a row is built."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin.benchmarks.models.mmdet_hosts import build_model, samples, small_config

from .hosts import NUM_CLASSES, NUM_LAYERS, Host


def missing() -> str | None:
    """Why MMDetection cannot be tested here; None if it can."""
    for package in ("mmengine", "mmcv", "mmdet"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    try:
        import mmdet.models  # noqa: F401
    except Exception as error:  # of versions that do not go together, or of missing ops
        return f"mmdet cannot be imported: {error}"
    return None


WEIGHTS = {"loss_cls": 2.0, "loss_bbox": 5.0, "loss_iou": 2.0}
COSTS = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def config(kind: str, queries: int = 12, layers: int = NUM_LAYERS, heads: int = 4, **settings: Any) -> dict[str, Any]:
    """A config of MMDetection's, small, of the detector of this kind: DINO or DeformableDETR."""
    # the code of a two-stage Deformable-DETR fixes its width; and of a DINO, in MMDetection up to 3.3
    width = 256 if kind == "DINO" or settings.get("as_two_stage") else 32
    model = small_config(kind, NUM_CLASSES, num_queries=queries, width=width)
    decoder = model["decoder"]
    decoder["num_layers"] = layers
    for attention in ("self_attn_cfg", "cross_attn_cfg"):
        decoder["layer_cfg"][attention] = {**decoder["layer_cfg"][attention], "num_heads": heads}
    if kind == "DINO":
        model["dn_cfg"]["group_cfg"]["num_dn_queries"] = 6
    return {**model, **settings}


@dataclass(frozen=True)
class MMDetHost(Host):
    """A model that takes preprocessed images and samples, and returns weighted losses."""

    sizes: list[tuple[int, int]] | None = None
    """Of the images in training, where they are padded."""

    decoder = "decoder"
    retired_heads = "reg_branches"

    def class_heads(self, model: nn.Module) -> nn.Module:
        return model.bbox_head.cls_branches

    def matcher(self, model: nn.Module) -> Any:
        return model.bbox_head.assigner

    def losses(self, model: nn.Module, images: Tensor, labels: list[dict[str, Tensor]]) -> tuple[Tensor, dict]:
        losses = model(images, samples(images, labels, self.sizes), mode="loss")
        return sum(losses.values()), losses  # as MMEngine adds them up

    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        found = [sample.pred_instances for sample in model(images, samples(images), mode="predict")]
        return torch.stack([x.scores for x in found]), torch.stack([x.bboxes for x in found])

    def predict_layers(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*model(images, samples(images), mode="tensor"), strict=True))

    def pixels(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1).to(images) for values in (_MEAN, _STD))
        return (images * std + mean).flip(1)

    def without_auxiliary_losses(self, model: nn.Module) -> None:
        pytest.skip("MMDetection supervises all layers, always")


def _build(kind: str, settings: dict[str, Any], **sizes: int) -> nn.Module:
    return build_model(config(kind, **settings, **sizes))


BUILDERS: dict[str, Callable[..., nn.Module]] = {}
"""From a host's name to what builds it, of other sizes as well."""


def row(name: str, kind: str, fdr: dict[str, Any] | None = None, **settings: Any) -> MMDetHost:
    """A host of further settings; `fdr` is what its FDRConfig must say."""
    BUILDERS[f"mmdet-{name}"] = builder = partial(_build, kind, settings)
    return MMDetHost(
        f"mmdet-{name}",
        builder,
        weighted_loss_dict=True,
        settings=fdr or {},
        missing=missing(),
        **({"dino": True} if kind == "DINO" else {}),
    )


HOSTS = [
    row("dino", "DINO"),
    row("deformable-detr-two-stage", "DeformableDETR", as_two_stage=True),
    row("deformable-detr-refine", "DeformableDETR"),
    row("deformable-detr-plain", "DeformableDETR", {"box_refinement": True}, with_box_refine=False),
]
