"""The rows of MMDetection. Nothing here imports it before a row is built."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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

_PREPROCESSOR = {
    "type": "DetDataPreprocessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "pad_size_divisor": 1,
}


def config(kind: str, num_layers: int = NUM_LAYERS, **settings: Any) -> dict[str, Any]:
    """A config of MMDetection's, small, of the detector of this kind: DINO or DeformableDETR."""
    # the code of a two-stage Deformable-DETR fixes its width; and of a DINO, in MMDetection up to 3.3
    levels, width = 3, 256 if kind == "DINO" or settings.get("as_two_stage") else 32
    attention = {"embed_dims": width, "num_heads": 4, "dropout": 0.0, "batch_first": True}
    deformable = {**attention, "num_levels": levels}
    feedforward = {"embed_dims": width, "feedforward_channels": 48, "ffn_drop": 0.0}
    model: dict[str, Any] = {
        "type": kind,
        "num_queries": 12,
        "with_box_refine": True,
        "as_two_stage": False,
        "num_feature_levels": levels,
        "data_preprocessor": _PREPROCESSOR,
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8, "out_indices": (1, 2, 3)},
        "neck": {
            "type": "ChannelMapper",
            "in_channels": [16, 32, 64],
            "kernel_size": 1,
            "out_channels": width,
            "norm_cfg": {"type": "GN", "num_groups": 8},
            "num_outs": levels,
        },
        "encoder": {
            "num_layers": 1,
            "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": feedforward},
        },
        "decoder": {
            "num_layers": num_layers,
            "return_intermediate": True,
            "layer_cfg": {
                "self_attn_cfg": attention,
                "cross_attn_cfg": deformable,
                "ffn_cfg": feedforward,
            },
            "post_norm_cfg": None,
        },
        "positional_encoding": {"num_feats": width // 2, "normalize": True, "offset": -0.5},
        "bbox_head": {
            "type": f"{kind}Head",
            "num_classes": NUM_CLASSES,
            "sync_cls_avg_factor": True,
            "embed_dims": width,
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 2.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
            "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
        },
        "train_cfg": {
            "assigner": {
                "type": "HungarianAssigner",
                "match_costs": [
                    {"type": "FocalLossCost", "weight": 2.0},
                    {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
                    {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
                ],
            }
        },
        "test_cfg": {"max_per_img": 12},
    }
    if kind == "DINO":
        model["as_two_stage"] = True
        model["dn_cfg"] = {
            "label_noise_scale": 0.5,
            "box_noise_scale": 1.0,
            "group_cfg": {"dynamic": True, "num_groups": None, "num_dn_queries": 6},
        }
        model["positional_encoding"]["temperature"] = 20
        model["positional_encoding"]["offset"] = 0.0
    model.update(settings)
    return model


def from_config(model: Any) -> nn.Module:
    """What MMDetection builds of a config's model."""
    import mmdet.models  # noqa: F401  (registers them)
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    return MODELS.build(model)


def build_model(kind: str, **settings: Any) -> nn.Module:
    """The detector of a config of this kind, initialised as MMDetection does."""
    model: Any = from_config(config(kind, **settings))
    model.init_weights()
    return model


def samples(
    images: Tensor, labels: list[dict[str, Tensor]] | None = None, sizes: list[tuple[int, int]] | None = None
) -> list[Any]:
    """What MMDetection's data preprocessor gives a model beside the images, which may be padded: `sizes` are theirs."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    padded = tuple(images.shape[-2:])
    sizes = sizes or [padded] * len(images)
    metas = [{"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)} for size in sizes]
    found = [DetDataSample(metainfo={**meta, "batch_input_shape": padded}) for meta in metas]
    for sample, target in zip(found, labels or [], strict=bool(labels)):
        centre, size = target["boxes"].split(2, dim=-1)
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        height, width = sample.img_shape
        scale = corners.new_tensor([width, height, width, height])
        sample.gt_instances = InstanceData(bboxes=corners * scale, labels=target["class_labels"].clone())
    return found


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
        mean, std = (torch.tensor(_PREPROCESSOR[name]).view(3, 1, 1).to(images) for name in ("mean", "std"))
        return (images * std + mean).flip(1)

    def without_auxiliary_losses(self, model: nn.Module) -> None:
        pytest.skip("MMDetection supervises all layers, always")


def row(name: str, kind: str, fdr: dict[str, Any] | None = None, **settings: Any) -> MMDetHost:
    """A host of further settings; `fdr` is what its FDRConfig must say."""
    return MMDetHost(
        f"mmdet-{name}",
        lambda: build_model(kind, **settings),
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
