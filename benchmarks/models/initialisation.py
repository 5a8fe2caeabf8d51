"""Weights to train a host of transformers from scratch, drawn as the hosts' authors draw theirs.

transformers draws every Linear and convolution from one narrow normal distribution, N(0, 0.01) in RT-DETR and
N(0, 0.02) in Deformable-DETR, since pretrained weights come after. From scratch the box heads of such a host stay dead,
and whatever replaces them wins by that alone. Done before the wrap: alike for baseline and twin. The hosts of detrex
draw theirs as the authors do themselves.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

PRIOR = 0.01
"""What a query's score for a class starts at, so that focal losses are not swamped by background."""

GROUPED = ("lw_detr", "rf_detr")
"""Hosts with groups of queries, by transformers' names."""

GROUNDED = ("grounding-dino", "mm-grounding-dino")
"""Hosts whose classes are a text's, likewise."""


def initialise_from_scratch(model: nn.Module) -> None:
    """Draw all weights of a transformers host anew, in place, from torch's global generator; nothing stays frozen.

    - Everything: as torch draws it; BatchNorm's and LayerNorm's weights 1.
    - The backbone's convolutions: He's normal distribution over the outputs, as torchvision's ResNets.
    - Self-attention: as torch's MultiheadAttention. Deformable attention keeps what transformers draws: it is the
      authors'.
    - RT-DETR (official `RTDETRTransformer`): Xavier in the decoder's feed-forward layers, the query position head and
      the encoder's output; zeros in the last layers of box heads.
    - Deformable-DETR (official `DeformableDETR`): Xavier in all of encoder, decoder and input projections; zeros in the
      last layers of box heads, whose first one starts at sides of sigmoid(-2) where references have no sides.
    - DAB-DETR and Conditional-DETR (official `DABDETR`, `ConditionalDETR`): Xavier in all of encoder and decoder; zeros
      in the last layer of the box head.
    - LW-DETR and RF-DETR (official `LWDETR`): the ViT as transformers draws it; Xavier in all of the decoder and in the
      encoder's output; zeros in references' offsets and in the last layers of box heads; the encoder's heads as copies
      of the model's.
    - Grounding DINO and MM Grounding DINO (official `GroundingDINO`): the text encoder, and what fuses text and image,
      as transformers draws them; Xavier in all else of encoder and decoder, in the encoder's output and in the
      projections; zeros in the last layers of box heads.
    - Class biases, where there are any: the focal loss's prior.

    Backbones that come frozen in part, BatchNorm included, train.
    """
    _unfreeze(model)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    kept = _deformable_attentions(model)
    if kind in GROUPED:
        kept.append("model.backbone.backbone")
    if kind in GROUNDED:
        kept += ["model.text_backbone", *(name for name, _ in model.named_modules() if name.endswith("fusion_layer"))]
    drawn = {name: m for name, m in model.named_modules() if not any(name.startswith(f"{prefix}.") for prefix in kept)}
    for name, module in drawn.items():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d) and "backbone" in name and kind not in GROUPED:
            initialise_convolution(module)
    for module in drawn.values():
        if hasattr(module, "q_proj"):
            _initialise_attention(module)
    if kind.startswith("rt_detr"):
        _initialise_rt_detr(model)
    elif kind == "deformable_detr":
        _initialise_deformable_detr(model)
    elif kind == "dab-detr":
        _initialise_dense(model, model.class_embed)
    elif kind == "conditional_detr":
        _initialise_dense(model, model.class_labels_classifier)
    elif kind in GROUPED:
        _initialise_lw_detr(model)
    elif kind in GROUNDED:
        _initialise_grounding_dino(model, [f"{prefix}." for prefix in kept])
    else:
        raise ValueError(f"no initialisation from scratch is known for {type(model).__name__}")


def initialise_convolution(convolution: nn.Conv2d) -> None:
    """Draw the weights of a backbone's convolution: He's normal distribution over the outputs, as torchvision's."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def _unfreeze(model: nn.Module) -> None:
    from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrFrozenBatchNorm2d
    from transformers.models.dab_detr.modeling_dab_detr import DabDetrFrozenBatchNorm2d
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrFrozenBatchNorm2d
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFrozenBatchNorm2d
    from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import MMGroundingDinoFrozenBatchNorm2d

    frozen = (
        ConditionalDetrFrozenBatchNorm2d,
        DabDetrFrozenBatchNorm2d,
        DeformableDetrFrozenBatchNorm2d,
        GroundingDinoFrozenBatchNorm2d,
        MMGroundingDinoFrozenBatchNorm2d,
    )
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, frozen):
                setattr(parent, name, nn.BatchNorm2d(len(child.weight)))
    model.requires_grad_(True)


def _deformable_attentions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "sampling_offsets")]


def _initialise_attention(attention: Any) -> None:
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        # torch draws the three as one (3C, C) matrix
        nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))
        nn.init.zeros_(projection.bias)
    nn.init.zeros_((attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj).bias)


def _initialise_rt_detr(model: Any) -> None:
    decoder = model.model.decoder
    feed_forward = [linear for layer in decoder.layers for linear in (layer.mlp.fc1, layer.mlp.fc2)]
    for linear in (*feed_forward, *decoder.query_pos_head.layers, model.model.enc_output[0]):
        nn.init.xavier_uniform_(linear.weight)
    for head in (*decoder.bbox_embed, model.model.enc_bbox_head):
        _zero(head.layers[-1])
    _set_class_bias(*decoder.class_embed, model.model.enc_score_head)


def _initialise_deformable_detr(model: Any) -> None:
    inner = model.model
    kept = _deformable_attentions(model)
    for name, module in inner.named_modules(prefix="model"):
        ours = isinstance(module, nn.Linear | nn.Conv2d) and "backbone" not in name and "_embed." not in name
        attention = name.endswith(("q_proj", "k_proj", "v_proj"))
        if ours and not attention and not any(name.startswith(f"{prefix}.") for prefix in kept):
            nn.init.xavier_uniform_(module.weight)
    for projection in inner.input_proj:
        nn.init.zeros_(projection[0].bias)
    if inner.level_embed is not None:
        nn.init.normal_(inner.level_embed)
    if hasattr(inner, "reference_points") and inner.reference_points is not None:
        nn.init.zeros_(inner.reference_points.bias)
    for heads in (model.class_embed, model.bbox_embed):
        # the authors' are copies of one another
        for head in heads[1:]:
            head.load_state_dict(heads[0].state_dict())
    for head in model.bbox_embed:
        _zero(head.layers[-1])
    if not model.config.two_stage:
        nn.init.constant_(model.bbox_embed[0].layers[-1].bias[2:], -2.0)
    _set_class_bias(*model.class_embed)


def _initialise_dense(model: Any, classifier: Any) -> None:
    for part in (model.model.encoder, model.model.decoder):
        drawn = [a for a in part.modules() if hasattr(a, "q_proj")]  # by _initialise_attention
        kept = {id(p) for attention in drawn for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear) and "bbox_embed" not in name and id(module) not in kept:
                nn.init.xavier_uniform_(module.weight)
    _zero(model.bbox_predictor.layers[-1])
    _set_class_bias(classifier)


def _initialise_lw_detr(model: Any) -> None:
    inner = model.model
    feed_forward = [linear for layer in inner.decoder.layers for linear in (layer.mlp.fc1, layer.mlp.fc2)]
    for linear in (*feed_forward, *inner.decoder.ref_point_head.layers, *inner.enc_output):
        nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(inner.reference_point_embed.weight)
    _zero(model.bbox_embed.layers[-1])
    _set_class_bias(model.class_embed)
    for own, copies in ((model.bbox_embed, inner.enc_out_bbox_embed), (model.class_embed, inner.enc_out_class_embed)):
        for head in copies:
            head.load_state_dict(own.state_dict())


def _initialise_grounding_dino(model: Any, kept: list[str]) -> None:
    inner = model.model
    for name, module in inner.named_modules(prefix="model"):
        ours = isinstance(module, nn.Linear | nn.Conv2d) and "backbone" not in name and "bbox_embed" not in name
        if ours and not name.startswith(tuple(kept)):
            # torch draws query, key and value as one (3C, C) matrix
            gain = math.sqrt(0.5) if name.endswith((".query", ".key", ".value")) else 1.0
            nn.init.xavier_uniform_(module.weight, gain)
    for projection in inner.input_proj_vision:
        nn.init.zeros_(projection[0].bias)
    nn.init.zeros_(inner.text_projection.bias)
    for head in (*model.bbox_embed, inner.encoder_output_bbox_embed):
        _zero(head.layers[-1])


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _set_class_bias(*heads: nn.Linear) -> None:
    for head in heads:
        nn.init.constant_(head.bias, math.log(PRIOR / (1 - PRIOR)))
