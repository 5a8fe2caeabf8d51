"""The rows of transformers: real classes, small."""

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from dfine_plugin.adapters.transformers.grounding_dino import release_too_old
from dfine_plugin.adapters.transformers.prompt import class_logits, fix_prompt

from .hosts import IMAGE_SIZE, NUM_CLASSES, NUM_LAYERS, Host, labels

_BACKBONE = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_DECODER = {
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": NUM_LAYERS,
    "num_queries": 12,
}
_RT_DETR = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    **_DECODER,
    "num_denoising": 6,
    "num_labels": NUM_CLASSES,
    "use_pretrained_backbone": False,
    "freeze_backbone_batch_norms": False,
}
_DEFORMABLE = {
    "d_model": 32,
    "encoder_layers": 1,
    **_DECODER,
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


def _dense_attention(
    config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], width: str, **others: int | bool
) -> PreTrainedModel:
    """A host that attends to all of one level, whose config has this name for its width, and further settings."""
    settings = {**_DECODER, "auxiliary_loss": True, **others}
    config = config_class(
        backbone_config=ResNetConfig(**{**_BACKBONE, "out_features": ["stage4"]}),
        **{width: 32},
        encoder_layers=1,
        num_labels=NUM_CLASSES,
        dropout=0.0,
        **settings,
        init_std=0.2,  # with less, queries that all begin as zeros stay alike
    )
    model = model_class(config)
    model.requires_grad_(True)  # the host freezes a backbone of its own making, in part or for good
    return model


_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "num_windows": 4,
    "out_indices": [1, 2],
    "mlp_ratio": 2,
}
_GROUPS = {
    "d_model": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": NUM_LAYERS,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 12,
    "group_detr": 3,
    "num_labels": NUM_CLASSES,
    "c2f_num_blocks": 1,
    "dropout": 0.0,
}


def _lw_detr() -> PreTrainedModel:
    backbone = LwDetrViTConfig(pretrain_image_size=IMAGE_SIZE, window_block_indices=[0], **_VIT)
    config = LwDetrConfig(backbone_config=backbone, projector_scale_factors=[2.0, 1.0], **_GROUPS)
    return LwDetrForObjectDetection(config)


def _rf_detr() -> PreTrainedModel:
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    return RfDetrForObjectDetection(RfDetrConfig(backbone_config=RfDetrDinov2Config(**_VIT), **_GROUPS))


PHRASES = ((1, 2), (4,), (6, 7, 8))
"""For each class its tokens in the text of hosts that take one."""
TEXT = {
    # delimiters around the phrases, a filling that is masked behind
    "input_ids": torch.tensor([[101, 20, 21, 1012, 30, 1012, 40, 41, 42, 1012, 102, 0]]),
    "attention_mask": torch.tensor([[1] * 11 + [0]]),
}
TEXT_LENGTH = int(TEXT["attention_mask"].sum())
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 1100,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_GROUNDING = {
    "d_model": 32,
    "encoder_layers": 1,
    **_DECODER,
    "num_feature_levels": 3,
    "max_text_len": 16,
    "auxiliary_loss": True,
    "dropout": 0.0,
    "fusion_droppath": 0.0,
}


def _grounding_dino(config: type[PreTrainedConfig], host: type[PreTrainedModel], **settings: bool) -> PreTrainedModel:
    parts = {"backbone_config": ResNetConfig(**_BACKBONE), "text_config": BertConfig(**_TEXT)}
    model = host(config(**parts, **_GROUNDING, **settings))
    fix_prompt(model, **TEXT)
    return model.requires_grad_(True)  # the host freezes its backbone


class TransformersHost(Host):
    """A model that takes pixels and labels, and returns outputs with loss and loss_dict."""

    decoder = "model.decoder"

    @property
    def encoder(self) -> str:
        return "model.backbone" if self.fixed_references else super().encoder

    def class_heads(self, model: nn.Module) -> nn.Module:
        if self.name == "conditional-detr":
            return model.class_labels_classifier
        return model.model.decoder.class_embed if self.name.startswith("rt-detr") else model.class_embed

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """The arguments of a forward for ``(B, 3, H, W)`` images, but for the labels."""
        return {"pixel_values": images}

    def losses(self, model: nn.Module, images: Tensor, labels: list[dict[str, Tensor]]) -> tuple[Tensor, dict]:
        outputs = model(**self.inputs(images), labels=labels)
        return outputs.loss, outputs.loss_dict

    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        outputs = model(**self.inputs(images))
        return outputs.logits, outputs.pred_boxes

    def predict_layers(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        outputs = model(**self.inputs(images), labels=labels())
        # RT-DETR's have the encoder's behind
        sets = [(layer["logits"], layer["pred_boxes"]) for layer in outputs.auxiliary_outputs[: NUM_LAYERS - 1]]
        return [*sets, (outputs.logits, outputs.pred_boxes)]

    def without_auxiliary_losses(self, model: nn.Module) -> None:
        model.config.auxiliary_loss = False


NO_TEXT_HOSTS = release_too_old()


class TextHost(TransformersHost):
    """A model that takes a text, too, and whose logits are of the text's tokens."""

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        text = {name: tokens.to(images.device).expand(len(images), -1) for name, tokens in TEXT.items()}
        return {"pixel_values": images, **text}

    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        logits, boxes = super().predict(model, images)
        assert (logits[..., TEXT_LENGTH:] == -torch.inf).all()
        return logits[..., :TEXT_LENGTH], boxes

    def predict_layers(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits of classes, as the model's adapter has them, and boxes."""
        shares = torch.zeros(model.config.max_text_len, len(PHRASES))
        for label, tokens in enumerate(PHRASES):
            shares[list(tokens), label] = 1 / len(tokens)
        return [(class_logits(logits, shares), boxes) for logits, boxes in super().predict_layers(model, images)]


HOSTS = [
    TransformersHost("rt-detr", _rt_detr, weighted_loss_dict=True),
    TransformersHost("rt-detr-v2", _rt_detr_v2, weighted_loss_dict=True),
    TransformersHost("deformable-detr-two-stage", lambda: _deformable_detr(True, True), False, checkpointing=True),
    TransformersHost("deformable-detr-refine", lambda: _deformable_detr(False, True), False, checkpointing=True),
    TransformersHost(
        "deformable-detr-plain",
        lambda: _deformable_detr(False, False),
        False,
        settings={"box_refinement": True},
        checkpointing=True,
    ),
    TransformersHost(
        "conditional-detr",
        lambda: _dense_attention(ConditionalDetrConfig, ConditionalDetrForObjectDetection, "d_model"),
        weighted_loss_dict=False,
        checkpointing=True,
        one_box_head=True,
        fixed_references=True,
    ),
    TransformersHost(
        "dab-detr",
        lambda: _dense_attention(DabDetrConfig, DabDetrForObjectDetection, "hidden_size"),
        weighted_loss_dict=False,
        one_box_head=True,
    ),
    TransformersHost("lw-detr", _lw_detr, weighted_loss_dict=False, one_box_head=True, fixed_references=True),
    TransformersHost(
        "rf-detr",
        _rf_detr,
        weighted_loss_dict=False,
        one_box_head=True,
        fixed_references=True,
        missing=None if hasattr(transformers, "RfDetrConfig") else "this release of transformers has no RF-DETR",
    ),
    TextHost(
        "grounding-dino",
        lambda: _grounding_dino(GroundingDinoConfig, GroundingDinoForObjectDetection),
        weighted_loss_dict=False,
        missing=NO_TEXT_HOSTS,
    ),
    TextHost(
        "mm-grounding-dino",
        lambda: _grounding_dino(
            MMGroundingDinoConfig,
            MMGroundingDinoForObjectDetection,
            decoder_bbox_embed_share=False,
            decoder_cls_embed_share=False,
        ),
        weighted_loss_dict=False,
        missing=NO_TEXT_HOSTS,
    ),
]
