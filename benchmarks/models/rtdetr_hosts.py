"""Hosts of RT-DETR's own repository for the ablation, small, taking pixels and labels like those of transformers."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from dfine_plugin.benchmarks.models.initialisation import initialise_convolution

ZOO = "src.zoo.rtdetr"
DECODERS = {1: ("rtdetr_decoder", "RTDETRTransformer"), 2: ("rtdetrv2_decoder", "RTDETRTransformerv2")}
COSTS = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
WEIGHTS = {"loss_vfl": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def missing(module: str = "rtdetr") -> str | None:
    """Why the repository, or a module of its zoo, cannot be used here; None if it can."""
    try:
        found = find_spec(f"{ZOO}.{module}")
    except ImportError as error:  # of the package itself, or of what it imports
        return f"{ZOO} cannot be imported (a folder of RT-DETR's own repository has to be on PYTHONPATH): {error}"
    return None if found else f"this folder of RT-DETR's own repository has no {module}"


def zoo(module: str) -> Any:
    """A module of the repository's zoo of RT-DETR."""
    return import_module(f"{ZOO}.{module}")


def build_model(
    version: int, backbone: nn.Module, channels: list[int], num_classes: int, width: int, **settings: Any
) -> nn.Module:
    """RT-DETR with a decoder of this version, with weights as its authors draw them.

    Args:
        version: of the decoder, 1 or 2.
        backbone: gives features of strides 8, 16 and 32.
        channels: of these.
        num_classes: of the data.
        width: of encoder and decoder.
        settings: further ones of the decoder; its layers are ``num_layers``. Unless they say otherwise it has four
            heads, and is as wide between its linear layers.
    """
    transformer = getattr(zoo(DECODERS[version][0]), DECODERS[version][1])
    if "num_layers" not in inspect.signature(transformer).parameters:  # version 1's folder has another name for it
        settings["num_decoder_layers"] = settings.pop("num_layers")
    decoder = transformer(
        num_classes=num_classes,
        hidden_dim=width,
        feat_channels=[width] * 3,
        feat_strides=[8, 16, 32],
        **{"nhead": 4, "dim_feedforward": width, **settings},
    )
    encoder = zoo("hybrid_encoder").HybridEncoder(
        in_channels=channels,
        hidden_dim=width,
        nhead=4,
        dim_feedforward=settings.get("dim_feedforward", width),
        expansion=0.5,
        depth_mult=0.34,
        eval_spatial_size=settings.get("eval_spatial_size"),
    )
    return zoo("rtdetr").RTDETR(backbone, encoder, decoder)


def build_criterion(
    version: int, num_classes: int, losses: tuple[str, ...] = ("vfl", "boxes"), **settings: Any
) -> nn.Module:
    """The criterion that the repository's configs have with a decoder of this version."""
    if version == 2:
        criterion = zoo("rtdetrv2_criterion").RTDETRCriterionv2
    else:
        module = zoo("rtdetr_criterion")
        criterion = module.SetCriterion if missing("rtdetrv2_decoder") else module.RTDETRCriterion
    matcher = zoo("matcher").HungarianMatcher(weight_dict=COSTS, use_focal_loss=True)
    return criterion(matcher, dict(WEIGHTS), list(losses), alpha=0.75, num_classes=num_classes, **settings)


def targets_of(labels: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Truths of transformers' under the repository's names."""
    return [{"labels": target["class_labels"], "boxes": target["boxes"]} for target in labels]


class Backbone(nn.Module):
    """The backbone that the rows of transformers' RT-DETR have, with weights as for them."""

    def __init__(self, **settings: Any) -> None:
        from transformers import RTDetrResNetBackbone, RTDetrResNetConfig

        super().__init__()
        self.resnet = RTDetrResNetBackbone(RTDetrResNetConfig(**settings))
        for module in self.resnet.modules():
            if isinstance(module, nn.Conv2d):
                initialise_convolution(module)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.resnet(x).feature_maps)


def build_rtdetr_host(version: int, class_names: list[str], num_queries: int, width: int, resnet: Any) -> nn.Module:
    """The host with a decoder of this version with fresh weights, in the sizes of transformers' twin.

    Args:
        version: of the decoder, 1 or 2.
        class_names: of the data.
        num_queries: of the decoder.
        width: of encoder and decoder.
        resnet: what :class:`transformers.RTDetrResNetConfig` takes, for three stages.

    Raises:
        ImportError: where no folder of the repository is on the path.
    """
    if why := missing(DECODERS[version][0]):
        raise ImportError(why)
    sizes = {"num_layers": 3, "num_queries": num_queries, "num_denoising": 20, "dim_feedforward": 2 * width}
    backbone, channels = Backbone(**resnet), resnet["hidden_sizes"][-3:]
    model = build_model(version, backbone, channels, len(class_names), width, **sizes)
    return PixelsAndLabels(model, build_criterion(version, len(class_names)))


class PixelsAndLabels(nn.Module):
    """A model of RT-DETR's repository with its criterion, behind the arguments and outputs of transformers' detectors.

    `detector` is the model itself, to be wrapped, and `criterion` what its trainer computes losses by, to be wrapped
    after it.
    """

    def __init__(self, detector: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.detector, self.criterion = detector, criterion

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> SimpleNamespace:
        """`loss` and `loss_dict` in training; `logits` (B, Q, classes) and `pred_boxes` (B, Q, 4) in evaluation."""
        if self.detector.training:
            assert labels is not None
            targets = targets_of(labels)
            losses = self.criterion(self.detector(pixel_values, targets), targets)
            return SimpleNamespace(loss=sum(losses.values()), loss_dict=losses)
        outputs = self.detector(pixel_values)
        return SimpleNamespace(logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"])
