"""Tiny detectors to train from scratch: real host classes with small configurations, by name.

Another host is one more builder under `@host`. A builder takes class names, the number of (matched) queries and the
width of the transformer, and returns a model that takes `pixel_values` (B, 3, H, W) and `labels` and returns `loss`,
`loss_dict`, `logits` (B, Q, classes), `pred_boxes` (B, Q, 4); what is to be wrapped is its `detector`, or the model
itself where it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dfine_plugin.benchmarks.models.detrex_configs import CALL_CUDA, CONFIGS, ONLY_WIDTH

if TYPE_CHECKING:
    from torch import nn

    Builder = Callable[[list[str], int, int], nn.Module]

WIDTH = 64
"""Of the hosts' transformers, where nothing else is asked for."""


@dataclass(frozen=True)
class Host:
    """A builder (class names, number of queries, width -> model) with the settings its family is trained with."""

    build: Builder
    learning_rate: float  # where --tune-lr starts from, and what is used without it
    clip_norm: float = 0.1
    calls_cuda: bool = False  # in its own training code, whatever the device
    bare_learns_by_mal: bool = True  # with --class-loss mal
    bare_looks_twice: bool = False  # if asked to, in the row that does
    only_width: int | None = None  # that its code takes


HOSTS: dict[str, Host] = {}


def host(name: str, learning_rate: float, **about: bool) -> Callable[[Builder], Builder]:
    """Register the decorated builder of a transformers host under `name`; weights are drawn as its authors do."""

    def register(build: Builder) -> Builder:
        def from_scratch(class_names: list[str], num_queries: int, width: int) -> nn.Module:
            from dfine_plugin.benchmarks.models.initialisation import initialise_from_scratch

            model = build(class_names, num_queries, width)
            initialise_from_scratch(model)
            return model

        HOSTS[name] = Host(from_scratch, learning_rate, **about)
        return build

    return register


def build_host(name: str, class_names: list[str], num_queries: int = 30, width: int | None = None) -> nn.Module:
    """The host `name` with fresh weights from torch's global generator, drawn as its authors draw them.

    Raises:
        ValueError: where there is no such host, or its code takes another width only.
    """
    if name not in HOSTS:
        raise ValueError(f"unknown host {name!r}; known are {', '.join(HOSTS)}")
    return HOSTS[name].build(class_names, num_queries, width_of(name, width))


def width_of(name: str, asked: int | None = None) -> int:
    """The width of the host's transformer: what is asked for, else :data:`WIDTH`, or the only one that its code takes.

    Raises:
        ValueError: where its code does not take what is asked for.
    """
    only = HOSTS[name].only_width
    if only and asked not in (None, only):
        raise ValueError(f"{asked} is not for {name}, whose code takes a width of {only} only")
    return asked or only or WIDTH


def _labels(class_names: list[str]) -> dict[str, Any]:
    """Class names in the two directions that a transformers config wants."""
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }


_RESNET: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}


def _rt_detr(class_names: list[str], num_queries: int, width: int) -> dict[str, Any]:
    return {
        "encoder_in_channels": [32, 64, 128],
        "encoder_hidden_dim": width,
        "encoder_ffn_dim": 2 * width,
        "encoder_attention_heads": 4,
        "hidden_expansion": 0.5,
        "d_model": width,
        "decoder_in_channels": [width] * 3,
        "decoder_ffn_dim": 2 * width,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "num_denoising": 20,
        "freeze_backbone_batch_norms": False,
        "num_queries": num_queries,
        **_labels(class_names),
    }


@host("rt-detr", learning_rate=2e-3, bare_looks_twice=True)
def rt_detr(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """RT-DETR, 0.8 M parameters: ResNet of one basic block a stage, three decoder layers."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(**_RESNET)
    config = RTDetrConfig(backbone_config=backbone, **_rt_detr(class_names, num_queries, width))
    return RTDetrForObjectDetection(config)


@host("rt-detr-v2", learning_rate=2e-3, bare_looks_twice=True)
def rt_detr_v2(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """RT-DETRv2, the same sizes."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(**_RESNET)
    config = RTDetrV2Config(backbone_config=backbone, **_rt_detr(class_names, num_queries, width))
    return RTDetrV2ForObjectDetection(config)


def _transformer(width: int) -> dict[str, Any]:
    return {
        "encoder_layers": 1,
        "encoder_ffn_dim": 2 * width,
        "encoder_attention_heads": 4,
        "decoder_layers": 3,
        "decoder_ffn_dim": 2 * width,
        "decoder_attention_heads": 4,
        "auxiliary_loss": True,
        # A model of this size underfits: dropout would cost accuracy, and randomness.
        "dropout": 0.0,
    }


def _deformable_detr(class_names: list[str], num_queries: int, width: int, two_stage: bool) -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(**_RESNET),
        d_model=width,
        num_feature_levels=3,
        num_queries=num_queries,
        two_stage_num_proposals=num_queries,
        two_stage=two_stage,
        with_box_refine=True,
        **_transformer(width),
        **_labels(class_names),
    )
    return DeformableDetrForObjectDetection(config)


@host("deformable-detr", learning_rate=2e-3)
def deformable_detr(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """Deformable-DETR with iterative box refinement, one stage: learned queries, no denoising."""
    return _deformable_detr(class_names, num_queries, width, two_stage=False)


@host("deformable-detr-two-stage", learning_rate=1e-3)
def deformable_detr_two_stage(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """The two-stage form, whose proposals transformers does not supervise."""
    return _deformable_detr(class_names, num_queries, width, two_stage=True)


def _dense_attention(class_names: list[str], num_queries: int, width: int) -> dict[str, Any]:
    """What the hosts that attend to all of one level have in common: a ResNet up to stride 8, and their sizes.

    At a stride of 16 an image of 96 pixels has 36 places to look at, and DAB-DETR does not converge.
    """
    from transformers import ResNetConfig

    stages = {"hidden_sizes": [32, 64], "depths": [1, 2], "out_features": ["stage2"]}
    return {
        "backbone_config": ResNetConfig(**{**_RESNET, **stages}),
        "num_queries": num_queries,
        **_transformer(width),
        **_labels(class_names),
    }


@host("dab-detr", learning_rate=1e-3)
def dab_detr(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """DAB-DETR, 0.4 M parameters: dense attention on one level, of stride 8; learned boxes for queries."""
    from transformers import DabDetrConfig, DabDetrForObjectDetection

    config = DabDetrConfig(hidden_size=width, **_dense_attention(class_names, num_queries, width))
    return DabDetrForObjectDetection(config)


@host("conditional-detr", learning_rate=5e-4)
def conditional_detr(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """Conditional-DETR, 0.4 M parameters: the same attention; learned points for queries, which stay where they are."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    config = ConditionalDetrConfig(d_model=width, **_dense_attention(class_names, num_queries, width))
    return ConditionalDetrForObjectDetection(config)


def _groups_of_queries(class_names: list[str], num_queries: int, width: int) -> dict[str, Any]:
    """What the hosts with groups of queries and fixed references have in common."""
    return {
        "c2f_num_blocks": 1,
        "d_model": width,
        "decoder_ffn_dim": 2 * width,
        "decoder_layers": 3,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "num_queries": num_queries,
        "group_detr": 3,
        **_labels(class_names),
    }


_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 16,
    "out_indices": [2, 4],
}


@host("lw-detr", learning_rate=2e-3)
def lw_detr(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """LW-DETR, 0.5 M parameters: a ViT of four layers, two levels, three groups of queries."""
    from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig

    backbone = LwDetrViTConfig(pretrain_image_size=96, num_windows=4, window_block_indices=[0, 2], **_VIT)
    config = LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[2.0, 1.0],
        **_groups_of_queries(class_names, num_queries, width),
    )
    return LwDetrForObjectDetection(config)


@host("rf-detr", learning_rate=2.5e-4)
def rf_detr(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """RF-DETR, 0.5 M parameters: the same on a DINOv2 of four layers, and one level, of stride 8 for small images."""
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(**{**_VIT, "patch_size": 8}, num_windows=2, use_mask_token=False)
    config = RfDetrConfig(backbone_config=backbone, **_groups_of_queries(class_names, num_queries, width))
    return RfDetrForObjectDetection(config)


def _grounding_dino(class_names: list[str], num_queries: int, width: int) -> dict[str, Any]:
    """What the two Grounding DINOs have in common: a BERT of one layer, the class names for a text.

    Two stages, for transformers has no other.
    """
    from transformers import BertConfig, ResNetConfig

    from dfine_plugin.benchmarks.models.text_hosts import FIRST_NAME

    text: dict[str, Any] = {
        "vocab_size": FIRST_NAME + len(class_names),
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return {
        "backbone_config": ResNetConfig(**_RESNET),
        "text_config": BertConfig(**text),
        "max_text_len": 2 + 2 * len(class_names),
        "d_model": width,
        "num_feature_levels": 3,
        "num_queries": num_queries,
        **_transformer(width),
        "fusion_droppath": 0.0,
        **_labels(class_names),
    }


@host("grounding-dino", learning_rate=1e-3, bare_learns_by_mal=False)
def grounding_dino(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """Grounding DINO: two stages, no denoising, similarities with the class names' tokens for classes."""
    from transformers import GroundingDinoConfig

    from dfine_plugin.benchmarks.models.text_hosts import PromptedGroundingDinoForObjectDetection

    config = GroundingDinoConfig(**_grounding_dino(class_names, num_queries, width))
    return PromptedGroundingDinoForObjectDetection(config)


@host("mm-grounding-dino", learning_rate=2e-3, bare_learns_by_mal=False)
def mm_grounding_dino(class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """MM Grounding DINO, the same sizes: similarities scaled by the width, with a bias."""
    from transformers import MMGroundingDinoConfig

    from dfine_plugin.benchmarks.models.text_hosts import PromptedMMGroundingDinoForObjectDetection

    config = MMGroundingDinoConfig(**_grounding_dino(class_names, num_queries, width))
    return PromptedMMGroundingDinoForObjectDetection(config)


def _detrex(name: str, class_names: list[str], num_queries: int, width: int) -> nn.Module:
    from dfine_plugin.benchmarks.models.detrex_hosts import build_detrex_host

    return build_detrex_host(name, class_names, num_queries, width)


def _mmdet(kind: str, class_names: list[str], num_queries: int, width: int) -> nn.Module:
    from dfine_plugin.benchmarks.models.mmdet_hosts import build_mmdet_host

    return build_mmdet_host(kind, class_names, num_queries, width)


def _rtdetr(version: int, class_names: list[str], num_queries: int, width: int) -> nn.Module:
    from dfine_plugin.benchmarks.models.rtdetr_hosts import build_rtdetr_host

    return build_rtdetr_host(version, class_names, num_queries, width, _RESNET)


for _name, _version, _rate in (("rt-detr", 1, 4e-3), ("rt-detr-v2", 2, 2e-3)):
    HOSTS[f"rtdetr/{_name}"] = Host(partial(_rtdetr, _version), learning_rate=_rate, bare_learns_by_mal=False)
for _name, _kind, _rate in (("deformable-detr", "DeformableDETR", 2e-3), ("dino", "DINO", 8e-3)):
    HOSTS[f"mmdet/{_name}"] = Host(partial(_mmdet, _kind), learning_rate=_rate, bare_learns_by_mal=False)
for _name in CONFIGS:
    HOSTS[f"detrex/{_name}"] = Host(
        partial(_detrex, _name),
        learning_rate=1e-3,
        calls_cuda=_name in CALL_CUDA,
        only_width=ONLY_WIDTH.get(_name),
    )
