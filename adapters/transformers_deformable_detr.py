"""Deformable-DETR of Hugging Face transformers: two-stage, with box refinement, and plain by explicit consent.

The decoder refines references, and the model computes each level's box a second time, from the decoder's hidden states
and those references: ``sigmoid(box_head(hidden) + isig(reference))``. The model's own box heads therefore give way to
heads that look the refined box up in the forward's record and return ``logit(box) - isig(reference)``, with the very
references that the model will add.
"""

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr import modeling_deformable_detr as host

from dfine_plugin.boxes import straight_through_clamp
from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.head import FDRHead, locate_initial_boxes
from dfine_plugin.record import FDRRecord, current_record, leave_record
from dfine_plugin.registry import register_adapter
from dfine_plugin.validation import check_finite

from . import transformers_common as common

LOGIT_EPS = 1e-5
"""The host reports sigmoids, which reach neither 0 nor 1: boxes are held this far inside, as in its inverse_sigmoid."""


def logit(boxes: Tensor) -> Tensor:
    """The logits whose sigmoids are the boxes; what lies outside ``(0, 1)`` keeps its gradient."""
    held = straight_through_clamp(boxes, LOGIT_EPS, 1 - LOGIT_EPS)
    return torch.log(held / (1 - held))


def box_delta(boxes: Tensor, reference: Tensor) -> Tensor:
    """What a box head must return for the host to report these boxes, given the reference it adds, 4-d or 2-d."""
    shift = host.inverse_sigmoid(reference)
    if reference.shape[-1] == 2:
        shift = F.pad(shift, (0, 2))
    return logit(boxes) - shift


class FDRDeformableDetrDecoder(host.DeformableDetrDecoder):
    """The host's decoder with the FDR head in its loop.

    Deployed, the boxes of the last level travel to the model's heads as further channels of its hidden states, in place
    of a record.
    """

    fdr: FDRHead
    bbox_embed: Any
    deployed = False

    @host.merge_with_config_defaults
    @host.capture_outputs
    def forward(
        self,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        object_queries_position_embeddings=None,
        reference_points=None,
        spatial_shapes=None,
        spatial_shapes_list=None,
        level_start_index=None,
        valid_ratios=None,
        **kwargs,
    ):
        hidden_states, reference = inputs_embeds, reference_points
        hidden: list[Tensor] = []
        references: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            ratios = torch.cat([valid_ratios] * (reference.shape[-1] // 2), dim=-1)
            hidden_states = layer(
                hidden_states,
                object_queries_position_embeddings,
                reference[:, :, None] * ratios[:, None],
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                encoder_hidden_states,  # positional, for gradient checkpointing
                encoder_attention_mask,
                **kwargs,
            )
            if index == 0:
                initial_boxes = locate_initial_boxes(self.bbox_embed[0](hidden_states), reference)
                state = self.fdr.start(initial_boxes)
                record = FDRRecord(self.fdr.weights, initial_boxes)
            state = self.fdr(index, hidden_states, state)
            record.references.append(reference)
            record.corner_logits.append(state.corner_logits)
            record.boxes.append(state.boxes)
            quality = self.fdr.quality_logits(index, state.corner_logits)
            if quality is not None:
                record.quality_logits.append(quality)
            reference = state.boxes.detach().to(reference.dtype)
            hidden.append(hidden_states)
            references.append(reference)

        if self.deployed:
            further = [box_delta(state.boxes, record.references[0]), *record.quality_logits]
            hidden = [torch.cat([hidden_states, *(part.to(hidden_states.dtype) for part in further)], dim=-1)]
            references = references[-1:]
        else:
            leave_record(record)
        return host.DeformableDetrDecoderOutput(
            last_hidden_state=hidden_states,
            intermediate_hidden_states=torch.stack(hidden, dim=1),
            intermediate_reference_points=torch.stack(references, dim=1),
        )


class RecordedBoxHead(nn.Module):
    """In place of the model's box head of one level: the level's refined box, as the delta the model expects.

    The first one is the host's own recast, for it holds the second name of the parameters that the decoder computes the
    initial boxes with.
    """

    level: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        record = current_record()
        return box_delta(record.boxes[self.level], record.references[self.level])


class QualityClassifier(nn.Linear):
    """The host's class head of one level, with the record's location quality added to its logits."""

    level: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = super().forward(hidden_states)
        record = current_record()
        if self.level == 0:
            record.initial_logits = logits
        return logits + record.quality_logits[self.level].to(logits.dtype)


class DeployedBoxHead(nn.Module):
    """Takes the box delta out of the channels that a deployed decoder adds to its hidden states."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, hidden_states: Tensor) -> Tensor:
        # a copy: the host adds 2-d references to it in place
        return hidden_states[..., self.hidden_dim : self.hidden_dim + 4].clone()


class DeployedClassifier(nn.Linear):
    """The host's last class head on the hidden channels, with the quality of the channels behind the box added."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden, _, quality = hidden_states.tensor_split([self.in_features, self.in_features + 4], dim=-1)
        logits = super().forward(hidden)
        return logits + quality if quality.shape[-1] else logits


class UnionDeformableDetrLoss(common.UnionCriterion, DeformableDetrImageLoss):
    """The host's criterion, fed with the union."""


class DeformableDetrGOLSDLoss:
    """Stands in for ``DeformableDetrForObjectDetectionLoss`` on a wrapped model; same arguments, same results.

    The host's loss dict is unweighted, and so are the terms that join it: ``loss_fgl*``, ``loss_ddf*`` and the initial
    boxes' (``*_pre``). The total takes each with its weight.
    """

    def __init__(self, config: FDRConfig) -> None:
        self.config = config

    def __call__(
        self,
        logits: Tensor,
        labels: list[dict[str, Tensor]],
        device: torch.device,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Tensor,
        outputs_coord: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        record = current_record()
        initial_logits = outputs_class[0] if record.initial_logits is None else record.initial_logits
        layers = [common.prediction_set(*layer) for layer in zip(outputs_class, outputs_coord, strict=True)]
        initial = common.prediction_set(initial_logits, record.initial_boxes)
        common.check_sets(layers, {"the initial boxes": initial})
        auxiliary = layers[:-1] if config.auxiliary_loss else []

        matcher = DeformableDetrHungarianMatcher(
            class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
        )
        criterion = UnionDeformableDetrLoss(
            matcher=matcher,
            num_classes=config.num_labels,
            focal_alpha=config.focal_alpha,
            losses=["labels", "boxes", "cardinality"],
        ).to(device)
        criterion.match([layers[-1], *auxiliary, initial], labels, self.config)
        losses = criterion({**layers[-1], "auxiliary_outputs": [*auxiliary, initial]}, labels)
        losses = common.rename_suffixes(losses, {f"_{len(auxiliary)}": "_pre"})

        supervised = layers if config.auxiliary_loss else layers[-1:]
        fgl, ddf = criterion.distribution_losses(record.last(len(supervised)), supervised, labels, self.config)
        suffixes = [*(f"_{i}" for i in range(len(auxiliary))), ""]
        losses.update({f"loss_fgl{suffix}": term for suffix, term in zip(suffixes, fgl, strict=True)})
        losses.update({f"loss_ddf{suffix}": term for suffix, term in zip(suffixes, ddf, strict=False)})
        check_finite(losses)
        weights = {
            "loss_ce": 1.0,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
            "loss_fgl": self.config.fgl_weight,
            "loss_ddf": self.config.ddf_weight,
        }
        weighted = [
            weight * losses[name + suffix]
            for suffix in [*suffixes, "_pre"]
            for name, weight in weights.items()
            if name + suffix in losses
        ]
        return torch.stack(weighted).sum(), losses, auxiliary or None


@register_adapter("transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrForObjectDetection")
class DeformableDetrAdapter(common.TransformersAdapter):
    """Deformable-DETR."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        host.DeformableDetrDecoder: FDRDeformableDetrDecoder
    }

    def check(self, model: common.Host, config: FDRConfig) -> None:
        super().check(model, config)
        if model.model.decoder.bbox_embed is None and not config.box_refinement:
            raise UnsupportedModelError(
                f"this {type(model).__name__} has with_box_refine=False. FDR refines references from layer to layer, "
                "which changes what its decoder attends to; FDRConfig(box_refinement=True) consents to that"
            )
        if model.model.decoder.bbox_embed is not None and (
            model.model.decoder.bbox_embed[0].layers[0].weight is not model.bbox_embed[0].layers[0].weight
        ):
            raise UnsupportedModelError(
                f"this {type(model).__name__} has different box heads on model and decoder (tie_word_embeddings=False)"
            )

    def make_loss(self, config: FDRConfig) -> DeformableDetrGOLSDLoss:
        return DeformableDetrGOLSDLoss(config)

    def attach_heads(self, model: common.Host, config: FDRConfig, retired: common.Retired) -> None:
        decoder = model.model.decoder
        num_layers = len(decoder.layers)
        retired.lists["model.decoder.bbox_embed"] = decoder.bbox_embed
        # Decoder and model need heads of their own that share their parameters, as hosts since transformers 5.13 have
        # them with box refinement; before, both held one ModuleList, and without refinement the decoder has none.
        own = model.bbox_embed[:1] if decoder.bbox_embed is None else decoder.bbox_embed
        decoder.bbox_embed = nn.ModuleList(_sharing_copy(head) for head in own)
        common.retire(model, [f"model.decoder.bbox_embed.{i}" for i in range(1, len(own)) if i < num_layers], retired)
        common.retire(model, [f"bbox_embed.{i}" for i in range(1, num_layers)], retired)
        looking_up: list[tuple[str, type[nn.Module]]] = [("bbox_embed", RecordedBoxHead)]
        if config.lqe:
            looking_up.append(("class_embed", QualityClassifier))
        for name, twin in looking_up:
            for level, head in enumerate(getattr(model, name)[:num_layers]):
                former = common.recast(head, twin)
                if f"{name}.{level}" not in retired.modules:
                    retired.classes[f"{name}.{level}"] = former
                head.level = level

    def detach(self, model: common.Host, retired: common.Retired) -> None:
        super().detach(model, retired)
        for head in (*model.bbox_embed, *model.class_embed):
            head.__dict__.pop("level", None)

    def deploy(self, model: common.Host) -> None:
        super().deploy(model)
        decoder = model.model.decoder
        decoder.deployed = True
        classifier = model.class_embed[len(decoder.layers) - 1]
        common.recast(classifier, DeployedClassifier)
        model.class_embed = nn.ModuleList([classifier])
        model.bbox_embed = nn.ModuleList([DeployedBoxHead(classifier.in_features)])
        common.retie(model)


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A second module of the same class with the same submodules, hence the same parameters."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
