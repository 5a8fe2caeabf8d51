"""The rows of RT-DETR's own repository. Nothing here imports its package, ``src``, before a row is built."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dfine_plugin import wrap_criterion
from dfine_plugin.benchmarks.models import rtdetr_hosts as small
from dfine_plugin.benchmarks.models.rtdetr_hosts import WEIGHTS, missing, targets_of, zoo
from dfine_plugin.wrapping import binding_of

from .hosts import IMAGE_SIZE, NUM_CLASSES, NUM_LAYERS, Host, labels

__all__ = ["HOSTS", "WEIGHTS", "RTDETRHost", "build_criterion", "build_model", "missing", "row", "targets_of", "zoo"]


class Backbone(nn.Module):
    """Features of strides 8, 16 and 32, as the repository's backbones give them."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = [3, 16, 24, 32], [8, 2, 2]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, d, stride + 1, stride, stride // 2), nn.BatchNorm2d(d), nn.ReLU())
            for c, d, stride in zip(widths, widths[1:], strides, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def build_model(version: int, num_layers: int = NUM_LAYERS, **settings: Any) -> nn.Module:
    """The host with a decoder of this version, and further arguments for the decoder."""
    sizes = {"num_queries": 12, "num_denoising": 6, "num_layers": num_layers}
    return small.build_model(version, Backbone(), [16, 24, 32], NUM_CLASSES, 32, **{**sizes, **settings})


def build_criterion(version: int, **settings: Any) -> nn.Module:
    """The criterion for it."""
    return small.build_criterion(version, NUM_CLASSES, **settings)


@dataclass(frozen=True)
class RTDETRHost(Host):
    """A model that takes images and truths, whose criterion is apart."""

    criterion_settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the criterion."""

    decoder = "decoder.decoder"
    retired_heads = "dec_bbox_head"

    @property
    def version(self) -> int:
        return 2 if self.name.endswith("v2") else 1

    @property
    def encoder(self) -> str:
        return "encoder"

    def class_heads(self, model: nn.Module) -> nn.Module:
        return model.decoder.dec_score_head

    def criterion(self, model: nn.Module) -> nn.Module:
        """What trains the model: where it is wrapped, the one criterion of its that is."""
        criterion = build_criterion(self.version, **self.criterion_settings)
        binding = binding_of(model)
        if binding is None or binding.deployed:
            return criterion
        if not binding.retired.criteria:
            wrap_criterion(criterion, model)
        return binding.retired.criteria[0]

    def matcher(self, model: nn.Module) -> nn.Module:
        return self.criterion(model).matcher

    def losses(self, model: nn.Module, images: Tensor, labels: list[dict[str, Tensor]]) -> tuple[Tensor, dict]:
        targets = targets_of(labels)
        criterion = self.criterion(getattr(model, "module", model))
        losses = criterion(model(images, targets), targets)
        return sum(losses.values()), losses  # as the repository's trainer adds them up

    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        outputs = model(images)
        return outputs["pred_logits"], outputs["pred_boxes"]

    def predict_layers(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        holders = model.decoder, model.decoder.decoder  # their parts are not: they report all layers and no more
        for module in holders:
            module.training = True
        outputs = model(images, targets_of(labels()))
        for module in holders:
            module.training = False
        sets = [*outputs["aux_outputs"][: NUM_LAYERS - 1], outputs]
        return [(layer["pred_logits"], layer["pred_boxes"]) for layer in sets]

    def without_auxiliary_losses(self, model: nn.Module) -> None:
        model.decoder.aux_loss = False


def row(name: str, criterion_settings: dict[str, Any] | None = None, **settings: Any) -> RTDETRHost:
    """A host of the version that its name ends with, of further arguments."""
    version = 2 if name.endswith("v2") else 1
    return RTDETRHost(
        name,
        lambda: build_model(version, **settings),
        weighted_loss_dict=True,
        missing=missing() or (missing("rtdetrv2_decoder") if version == 2 else None),
        criterion_settings=criterion_settings or {},
    )


HOSTS = [
    row("authors-rt-detr"),
    row("authors-rt-detr-v2", eval_spatial_size=[IMAGE_SIZE, IMAGE_SIZE]),
]
