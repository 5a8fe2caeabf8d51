"""detrex's Conditional-DETR, and what it shares with Group-DETR: all layers predict from one fixed reference point.

The decoder runs as it is; then the one box head's box for the first layer, or for a later one, is the frame whose edges
the distributions move, layer by layer. The model asks its box head layer by layer.
"""

from typing import Any, ClassVar

from detrex.layers import MLP
from detrex.modeling import SetCriterion
from projects.conditional_detr.modeling import ConditionalDetrTransformerDecoder
from torch import Tensor, nn

from dfine_plugin.record import current_scope
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes, refining_heads
from ..host_parts import Host
from .adapter import DECODER, DetrexAdapter
from .criterion import GOLSDSetCriterion
from .decoder import RefiningDecoder


class FixedPointBoxHead(refining_heads.FixedReferenceBoxHead, MLP):
    """The model's box head."""


class FixedPointDecoder(RefiningDecoder):
    """Mixin before a decoder of the family, which holds the box head under a second name."""

    bbox_embed: Any

    def run(self, *args, **kwargs):
        hidden_states, points = super(refining_heads.RefiningDecoder, self).forward(*args, **kwargs)
        scope = current_scope()
        reference_logits = recomputed_boxes.four(self.inverse_sigmoid(points))
        progress = scope.progress = refining_heads.FixedReference(reference_logits)
        scope.record = refining_heads.refine_afterwards(
            self.fdr, lambda states: progress.boxes_of(self.bbox_embed.locate(states)), hidden_states.unbind()
        )
        if self.deployed:
            hidden_states = recomputed_boxes.last_level(scope.record, hidden_states, reference_logits)
        return hidden_states, points


class FixedPointAdapter(DetrexAdapter):
    """Base of the adapters for the family. The box head stays, to locate the initial boxes: nothing retires."""

    fixed_references = True
    initial_layer = 2
    """As of transformers' Conditional-DETR."""

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
        return reference, current_scope().progress.boxes_of(model.bbox_embed.locate(hidden_states))


class FDRConditionalDetrDecoder(FixedPointDecoder, ConditionalDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


@register_adapter("projects.conditional_detr.modeling.conditional_detr.ConditionalDETR")
class ConditionalDetrAdapter(FixedPointAdapter):
    """Conditional-DETR."""

    decoder_classes: ClassVar = {ConditionalDetrTransformerDecoder: FDRConditionalDetrDecoder}
    criterion_classes: ClassVar = {SetCriterion: GOLSDSetCriterion}
