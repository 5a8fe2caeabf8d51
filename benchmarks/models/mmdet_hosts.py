"""MMDetection's hosts for the ablation, small, as models that take pixels and labels like those of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torchvision.ops import box_convert


def small_config(kind: str, num_classes: int, num_queries: int, width: int) -> dict[str, Any]:
    """The model of one of MMDetection's configs of this kind, DeformableDETR (refining, one stage) or DINO, small.

    Three levels, an encoder layer and three decoder layers; the backbone is a ResNet-18 of an eighth of the channels,
    all of it to be trained.
    """
    levels = 3
    attention = {"embed_dims": width, "num_heads": 4, "dropout": 0.0, "batch_first": True}
    deformable = {**attention, "num_levels": levels}
    feedforward = {"embed_dims": width, "feedforward_channels": 2 * width, "ffn_drop": 0.0}
    model: dict[str, Any] = {
        "type": kind,
        "num_queries": num_queries,
        "with_box_refine": True,
        "as_two_stage": False,
        "num_feature_levels": levels,
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
            "bgr_to_rgb": True,
        },
        "backbone": {
            "type": "ResNet",
            "depth": 18,
            "base_channels": 8,
            "stem_channels": 8,
            "out_indices": (1, 2, 3),
            "norm_eval": False,
            "zero_init_residual": False,
        },
        "neck": {
            "type": "ChannelMapper",
            "in_channels": [16, 32, 64],
            "kernel_size": 1,
            "out_channels": width,
            "norm_cfg": {"type": "GN", "num_groups": 8},
            "num_outs": levels,
        },
        "encoder": {"num_layers": 1, "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": feedforward}},
        "decoder": {
            "num_layers": 3,
            "return_intermediate": True,
            "layer_cfg": {"self_attn_cfg": attention, "cross_attn_cfg": deformable, "ffn_cfg": feedforward},
            "post_norm_cfg": None,
        },
        "positional_encoding": {"num_feats": width // 2, "normalize": True, "offset": -0.5},
        "bbox_head": {
            "type": f"{kind}Head",
            "num_classes": num_classes,
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
        "test_cfg": {"max_per_img": num_queries},
    }
    if kind == "DINO":
        model["as_two_stage"] = True
        groups = {"dynamic": True, "num_groups": None, "num_dn_queries": 20}
        model["dn_cfg"] = {"label_noise_scale": 0.5, "box_noise_scale": 1.0, "group_cfg": groups}
        model["positional_encoding"] |= {"temperature": 20, "offset": 0.0}
    return model


def build_model(config: dict[str, Any]) -> nn.Module:
    """What MMDetection builds of a config's model, with weights as it draws them.

    Raises:
        ImportError: where MMDetection is not installed.
    """
    try:
        import mmdet.models  # noqa: F401  (registers them)
        from mmdet.registry import MODELS
        from mmengine.registry import init_default_scope
    except ImportError as error:
        raise ImportError(f"the hosts of MMDetection need MMDetection 3 and mmcv with its ops: {error}") from error
    init_default_scope("mmdet")
    model: Any = MODELS.build(config)
    model.init_weights()
    return model


def build_mmdet_host(kind: str, class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """The host of this kind with fresh weights, and a transformer of this width.

    Raises:
        ImportError: where MMDetection is not installed.
    """
    return PixelsAndLabels(build_model(small_config(kind, len(class_names), num_queries, width)))


class PixelsAndLabels(nn.Module):
    """A model of MMDetection behind the arguments and outputs of transformers' detectors.

    `detector` is the model itself, to be wrapped. The ablation normalises its images.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> SimpleNamespace:
        """`loss` and `loss_dict` in training; `logits` (B, Q, classes) and `pred_boxes` (B, Q, 4) in evaluation."""
        if self.detector.training:
            assert labels is not None
            losses = self.detector(pixel_values, samples(pixel_values, labels), mode="loss")
            return SimpleNamespace(loss=sum(losses.values()).squeeze(), loss_dict=losses)
        logits, boxes = self.detector(pixel_values, samples(pixel_values), mode="tensor")
        return SimpleNamespace(logits=logits[-1], pred_boxes=boxes[-1])


def samples(
    images: Tensor, labels: list[dict[str, Tensor]] | None = None, sizes: list[tuple[int, int]] | None = None
) -> list[Any]:
    """What MMDetection's data preprocessor gives a model beside the images, with truths of transformers'.

    Args:
        images: ``(B, 3, H, W)``.
        labels: of each image.
        sizes: heights and widths of the images, where they are padded.
    """
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    height, width = images.shape[-2:]
    padded = height, width
    sizes = sizes or [padded] * len(images)
    metas = [{"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)} for size in sizes]
    found = [DetDataSample(metainfo={**meta, "batch_input_shape": padded}) for meta in metas]
    for sample, target in zip(found, labels or [], strict=bool(labels)):
        height, width = sample.img_shape
        corners = box_convert(target["boxes"], "cxcywh", "xyxy")
        corners = corners * corners.new_tensor([width, height, width, height])
        sample.gt_instances = InstanceData(bboxes=corners, labels=target["class_labels"].clone())
    return found
