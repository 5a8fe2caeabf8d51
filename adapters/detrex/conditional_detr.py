"""detrex's Conditional-DETR, and what it shares with Group-DETR: all layers predict from one fixed reference point.

The decoder runs as it is; then the one box head's box for the first layer is the frame whose edges the distributions
move, layer by layer. The model asks its box head layer by layer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from detrex.layers import MLP
from detrex.modeling import SetCriterion
from projects.conditional_detr.modeling import ConditionalDetrTransformerDecoder
from torch import Tensor, nn

from dfine_plugin.boxes import at_least_float32
from dfine_plugin.record import current_record, current_scope
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes, refining_heads
from ..host_parts import Host
from .adapter import DECODER, DetrexAdapter
from .criterion import GOLSDSetCriterion
from .decoder import RefiningDecoder


@dataclass
class Progress:
    """What the decoder hands to the model's heads.

    Attributes:
        reference_logits: ``(B, Q, 4)``, of all layers.
        asked: how many layers' boxes the model has asked for.
    """

    reference_logits: Tensor
    asked: int = 0


class FixedPointBoxHead(MLP):
    """The model's box head: the refined boxes, as the deltas that the model expects."""

    def locate(self, hidden_states: Tensor) -> Tensor:
        """What the host's own head answers, ``(B, Q, 4)``: it locates the initial boxes."""
        return super().forward(hidden_states)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, Q, 4)``, layer by layer."""
        progress = current_scope().progress
        delta = recomputed_boxes.logit(current_record().boxes[progress.asked]) - progress.reference_logits
        progress.asked += 1
        return delta


class FixedPointDecoder(RefiningDecoder):
    """Mixin before a decoder of the family, which holds the box head under a second name."""

    bbox_embed: Any

    def run(self, *args, **kwargs):
        hidden_states, points = super(refining_heads.RefiningDecoder, self).forward(*args, **kwargs)
        scope = current_scope()
        reference_logits = recomputed_boxes.four(self.inverse_sigmoid(points))
        scope.progress = Progress(reference_logits)
        initial_boxes = (at_least_float32(self.bbox_embed.locate(hidden_states[0])) + reference_logits).sigmoid()
        scope.record = refining_heads.refine_afterwards(self.fdr, initial_boxes, hidden_states.unbind())
        if self.deployed:
            hidden_states = recomputed_boxes.last_level(scope.record, hidden_states, reference_logits)
        return hidden_states, points


class FixedPointAdapter(DetrexAdapter):
    """Base of the adapters for the family. The box head stays, to locate the initial boxes: nothing retires."""

    fixed_references = True

    def first_box_head(self, model: Host) -> nn.Module:
        return model.bbox_embed

    def attach_heads(self, model: Host, num_layers: int, retired: host_parts.Retired) -> None:
        retired.box_heads = [model.bbox_embed] * (num_layers - 1)
        retired.recast(model, "bbox_embed", FixedPointBoxHead)
        retired.recast(model, "class_embed", recomputed_boxes.StackedClassifier)
        retired.replace(model, f"{DECODER}.bbox_embed", model.bbox_embed)

    def deploy_heads(self, model: Host) -> None:
        recomputed_boxes.replace_shared_heads_by_deployed(model, "bbox_embed")

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`. The decoder goes on with the points that it began with."""
        delta = at_least_float32(model.bbox_embed.locate(hidden_states))
        return reference, (delta + current_scope().progress.reference_logits).sigmoid()


class FDRConditionalDetrDecoder(FixedPointDecoder, ConditionalDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


@register_adapter("projects.conditional_detr.modeling.conditional_detr.ConditionalDETR")
class ConditionalDetrAdapter(FixedPointAdapter):
    """Conditional-DETR."""

    decoder_classes: ClassVar = {ConditionalDetrTransformerDecoder: FDRConditionalDetrDecoder}
    criterion_classes: ClassVar = {SetCriterion: GOLSDSetCriterion}
