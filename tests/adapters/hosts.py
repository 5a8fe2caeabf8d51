"""The hosts that every shared behaviour runs over: the real classes, small, randomly initialised. A row is a host."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from dfine_plugin import FDRConfig

NUM_CLASSES = 3
NUM_LAYERS = 3
IMAGE_SIZE = 64

_BACKBONE = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_RT_DETR = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": NUM_LAYERS,
    "num_queries": 12,
    "num_denoising": 6,
    "num_labels": NUM_CLASSES,
    "use_pretrained_backbone": False,
    "freeze_backbone_batch_norms": False,
}
_DEFORMABLE = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": NUM_LAYERS,
    "num_queries": 12,
    "two_stage_num_proposals": 12,
    "num_feature_levels": 3,
    "num_labels": NUM_CLASSES,
    "auxiliary_loss": True,
    "dropout": 0.0,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}


def _rt_detr() -> PreTrainedModel:
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=RTDetrResNetConfig(**_BACKBONE), **_RT_DETR))


def _rt_detr_v2() -> PreTrainedModel:
    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=RTDetrResNetConfig(**_BACKBONE), **_RT_DETR))


def _deformable_detr(two_stage: bool, with_box_refine: bool) -> PreTrainedModel:
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(**_BACKBONE), two_stage=two_stage, with_box_refine=with_box_refine, **_DEFORMABLE
    )
    model = DeformableDetrForObjectDetection(config)
    model.requires_grad_(True)  # the host freezes a backbone of its own making for good
    return model


@dataclass(frozen=True)
class Host:
    """One row: how to build the host, and what is special about it."""

    name: str
    build: Callable[[], PreTrainedModel]
    weighted_loss_dict: bool
    """Whether the host's loss dict holds weighted terms."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What an FDRConfig for this host must say."""
    checkpointing: bool = False
    """Whether the host supports gradient checkpointing."""

    def config(self, **settings: Any) -> FDRConfig:
        return FDRConfig(**{**self.settings, **settings})

    def __str__(self) -> str:
        return self.name


HOSTS = [
    Host("rt-detr", _rt_detr, weighted_loss_dict=True),
    Host("rt-detr-v2", _rt_detr_v2, weighted_loss_dict=True),
    Host("deformable-detr-two-stage", lambda: _deformable_detr(True, True), False, checkpointing=True),
    Host("deformable-detr-refine", lambda: _deformable_detr(False, True), False, checkpointing=True),
    Host(
        "deformable-detr-plain",
        lambda: _deformable_detr(False, False),
        False,
        settings={"box_refinement": True},
        checkpointing=True,
    ),
]


def build(host: Host, seed: int = 0) -> PreTrainedModel:
    """The host with random weights, spread so that no head, norm or class sits at a special value."""
    torch.manual_seed(seed)
    model = host.build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "bbox" in name or "class_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def randomise_fdr(model: PreTrainedModel, seed: int = 1, scale: float = 0.3) -> None:
    """Move the FDR head off its zeros, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.decoder.fdr.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def images(batch: int = 2, seed: int = 2) -> Tensor:
    """``(B, 3, H, W)`` noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def labels(counts: tuple[int, ...] = (2, 3), seed: int = 3) -> list[dict[str, Tensor]]:
    """For each image so many random truths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            "boxes": torch.cat(
                [
                    0.3 + 0.4 * torch.rand(count, 2, generator=generator),
                    0.1 + 0.4 * torch.rand(count, 2, generator=generator),
                ],
                dim=1,
            ),
        }
        for count in counts
    ]
