"""detrex's DAB-DETR, and what it shares with DN-DETR: queries before images, and one box head for all layers.

The decoder calls its box head once a layer, the model once on all layers' normed states.
"""

from typing import Any, ClassVar

import torch
from detrex.layers import MLP
from detrex.modeling import SetCriterion
from detrex.utils import inverse_sigmoid
from projects.dab_detr.modeling import DabDetrTransformerDecoder
from torch import Tensor, nn

from dfine_plugin.record import FDRRecord, current_record, current_scope
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes
from ..recomputed_boxes import logit
from .adapter import DECODER, DetrexAdapter
from .criterion import GOLSDCriterion
from .decoder import RefiningDecoder


class SharedRefiningBoxHead(MLP):
    """The decoder's only box head: locates the initial boxes when first called in a run, refines at every call."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        progress = current_scope().progress
        hidden_states = hidden_states.transpose(0, 1)  # (B, Q, C)
        if progress.record is None:
            progress.begin(super().forward(hidden_states))
        return progress.refine(hidden_states).transpose(0, 1)


class StackedBoxHead(MLP):
    """The model's box head: the refined boxes of all levels, as the deltas the model expects; ``(L, B, Q, 4)``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        record = current_record()
        deltas = [logit(boxes) - logits for boxes, logits in zip(record.boxes, record.reference_logits, strict=True)]
        return torch.stack(deltas)


class StackedClassifier(nn.Linear):
    """The model's class head on all levels, with the record's location quality added; ``(L, B, Q, classes)``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = super().forward(hidden_states)
        record = current_record()
        record.initial_logits = logits[0]
        return logits + torch.stack(record.quality_logits).to(logits.dtype) if record.quality_logits else logits


class QueriesFirstDecoder(RefiningDecoder):
    """Mixin before a decoder of the family."""

    def initial_reference_logits(self, **inputs: Any) -> Tensor:
        return inverse_sigmoid(inputs["anchor_box_embed"].sigmoid()).transpose(0, 1)

    def last_level(self, record: FDRRecord, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden_states, references = outputs
        delta = logit(record.boxes[-1]) - record.reference_logits[-1]
        return recomputed_boxes.with_channels(hidden_states[-1], delta, record.quality_logits)[None], references[-1:]


class SharedBoxHeadAdapter(DetrexAdapter):
    """Base of the adapters for hosts with one box head. It stays, to locate the initial boxes: nothing retires."""

    reported_norm = "post_norm_layer"

    def first_box_head(self, model: Any) -> nn.Module:
        return model.bbox_embed

    def attach_heads(self, model: Any, num_layers: int, retired: host_parts.Retired) -> None:
        retired.box_heads = [model.bbox_embed] * (num_layers - 1)
        for name, twin in (
            (f"{DECODER}.bbox_embed", SharedRefiningBoxHead),
            ("bbox_embed", StackedBoxHead),
            ("class_embed", StackedClassifier),
        ):
            head = host_parts.sharing_copy(model.get_submodule(name))
            host_parts.recast(head, twin)
            retired.replace(model, name, head)

    def deploy_heads(self, model: Any) -> None:
        host_parts.recast(model.class_embed, recomputed_boxes.DeployedClassifier)
        model.bbox_embed = recomputed_boxes.DeployedBoxHead(model.class_embed.in_features)


class FDRDabDetrDecoder(QueriesFirstDecoder, DabDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDSetCriterion(GOLSDCriterion, SetCriterion):
    """The host's criterion, fed with the union."""


@register_adapter("projects.dab_detr.modeling.dab_detr.DABDETR")
class DABDetrAdapter(SharedBoxHeadAdapter):
    """DAB-DETR."""

    decoder_classes: ClassVar = {DabDetrTransformerDecoder: FDRDabDetrDecoder}
    criterion_classes: ClassVar = {SetCriterion: GOLSDSetCriterion}
