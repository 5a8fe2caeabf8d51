"""Conditional-DETR of Hugging Face transformers, whose loss is Deformable-DETR's.

Every decoder layer predicts from one fixed reference point, by one box head that all share. So the decoder runs as it
is, but for the states of its layers, which are noted as they go into the next one; then the head's box for the first
layer, or for a later one, is the frame whose edges the distributions move, layer by layer. The model asks its box head
for the last layer and then, with auxiliary losses, layer by layer.

With auxiliary losses the host norms each layer's states before the next layer, and the last layer's once more. What
the last layer predicts comes of that, wrapped and bare.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as host

from dfine_plugin.boxes import at_least_float32
from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.record import current_scope
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes
from ..refining_heads import FixedReference, FixedReferenceBoxHead, RefiningDecoder, refine_afterwards
from . import adapter as hf
from .deformable_detr import DeformableDetrGOLSDLoss


@dataclass
class Progress(FixedReference):
    """What decoder and heads hand to one another in a forward.

    Attributes:
        box_head: locates the initial boxes, and is the host's for all layers.
        states: ``(B, Q, C)``, of each layer but the last, as the next one takes them.
        first_hidden_states: ``(B, Q, C)``, what the model's heads get of the first layer.
    """

    asked_for: int = -1
    box_head: Any = None
    states: list[Tensor] = field(default_factory=list)
    first_hidden_states: Tensor | None = None


class NotedScale(host.ConditionalDetrMLPPredictionHead):
    """The decoder's scale of query positions, which every layer after the first asks with the states it begins with."""

    def forward(self, x: Tensor) -> Tensor:
        current_scope().progress.states.append(x)
        return super().forward(x)


class RecordedBoxHead(FixedReferenceBoxHead, host.ConditionalDetrMLPPredictionHead):
    """The model's box head, which is asked for the last layer first."""


class FDRConditionalDetrDecoder(RefiningDecoder, host.ConditionalDetrDecoder):
    """The host's decoder, which refines distributions on the states of all layers when these have run.

    Deployed, it holds the box head that locates the initial boxes.
    """

    bbox_embed: Any

    def run(self, *args, **kwargs):
        scope = current_scope()
        progress = scope.progress = scope.progress or Progress(box_head=self.bbox_embed if self.deployed else None)
        outputs = host.ConditionalDetrDecoder.forward(self, *args, **kwargs)
        if progress.box_head is None:
            return outputs  # the model's heads, which would ask for boxes, do not run
        hidden = self.reported_states(progress.states, outputs)
        outputs.reference_points = recomputed_boxes.finite_logits(outputs.reference_points)
        reference_logits = host.inverse_sigmoid(at_least_float32(outputs.reference_points)).transpose(0, 1)
        progress.reference_logits = recomputed_boxes.four(reference_logits)
        progress.first_hidden_states = hidden[0]
        locate = getattr(progress.box_head, "locate", progress.box_head)
        record = scope.record = refine_afterwards(self.fdr, lambda states: progress.boxes_of(locate(states)), hidden)
        if self.deployed:
            last = recomputed_boxes.last_level(record, hidden[-1][None], progress.reference_logits)
            outputs.last_hidden_state, outputs.intermediate_hidden_states = last[0], last
        return outputs

    def reported_states(self, states: list[Tensor], outputs: Any) -> list[Tensor]:
        """For each layer ``(B, Q, C)``, what the model's heads get of it, from what the layers after the first got."""
        if not self.config.auxiliary_loss:
            return [*(self.layernorm(state) for state in states), outputs.last_hidden_state]
        whole = len(self.layers) == self.config.decoder_layers
        return [*states, outputs.last_hidden_state if whole else outputs.intermediate_hidden_states[-1]]


@register_adapter("transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrForObjectDetection")
class ConditionalDetrAdapter(hf.TransformersAdapter):
    """Conditional-DETR. Its box head stays, to locate the initial boxes: nothing retires."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        host.ConditionalDetrDecoder: FDRConditionalDetrDecoder
    }
    loss_class = DeformableDetrGOLSDLoss
    fixed_references = True
    initial_layer = 2
    """The first one begins with queries that know nothing of the image, and its boxes are too coarse a frame."""

    def check(self, model: host_parts.Host, config: FDRConfig) -> None:
        super().check(model, config)
        name = type(model).__name__
        if type(model.bbox_predictor) is not host.ConditionalDetrMLPPredictionHead:
            raise UnsupportedModelError(f"this {name} has a box head of another class: {type(model.bbox_predictor)}")
        if model.config.decoder_layerdrop:
            raise UnsupportedModelError(
                f"this {name} leaves out whole decoder layers in training "
                f"(decoder_layerdrop={model.config.decoder_layerdrop}), and each layer refines the last one's boxes"
            )

    def attach_heads(self, model: host_parts.Host, config: FDRConfig, retired: hf.Retired) -> None:
        retired.box_heads = [model.bbox_predictor] * (len(model.model.decoder.layers) - 1)
        retired.recast(model, "bbox_predictor", RecordedBoxHead)
        retired.recast(model, "class_labels_classifier", recomputed_boxes.StackedClassifier)
        retired.recast(model, "model.decoder.query_scale", NotedScale)

    def begin(self, model: host_parts.Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().begin(model, args, kwargs)
        current_scope().progress = Progress(box_head=model.bbox_predictor)

    def keep_layers(self, model: host_parts.Host, num_layers: int) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        whole = num_layers == len(model.model.decoder.layers)
        if model.config.auxiliary_loss and not whole and not isinstance(model.model.decoder, FDRConditionalDetrDecoder):
            raise ValueError(
                "with auxiliary_loss=True this bare host norms the states of its last layer twice, and of the layers "
                "before once: fewer layers would not predict what they did"
            )
        super().keep_layers(model, num_layers)

    def deploy(self, model: host_parts.Host) -> None:
        super().deploy(model)
        decoder, head = model.model.decoder, model.bbox_predictor
        host_parts.recast(head, host.ConditionalDetrMLPPredictionHead)
        decoder.bbox_embed, decoder.deployed = head, True
        recomputed_boxes.replace_shared_heads_by_deployed(model, "bbox_predictor", "class_labels_classifier")

    def host_boxes(
        self, model: host_parts.Host, layer: int, hidden_states: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`. The decoder goes on with the references that it began with."""
        progress = current_scope().progress
        return reference, progress.boxes_of(progress.box_head.locate(hidden_states))
