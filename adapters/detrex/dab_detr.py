"""detrex's DAB-DETR, and what it shares with DN-DETR: queries before images, and one box head for all layers.

The decoder calls its box head once a layer, the model once on all layers' normed states.
"""

from typing import Any, ClassVar

from detrex.modeling import SetCriterion
from detrex.utils import inverse_sigmoid
from projects.dab_detr.modeling import DabDetrTransformerDecoder
from torch import Tensor, nn

from dfine_plugin.record import FDRRecord
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes
from .adapter import DECODER, DetrexAdapter
from .criterion import GOLSDSetCriterion
from .decoder import InitialBoxHead, RefiningDecoder


class SharedBoxHead(InitialBoxHead):
    """The decoder's only box head, which gets ``(Q, B, C)``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.transpose(0, 1)).transpose(0, 1)


class QueriesFirstDecoder(RefiningDecoder):
    """Mixin before a decoder of the family."""

    def initial_reference_logits(self, **inputs: Any) -> Tensor:
        return inverse_sigmoid(inputs["anchor_box_embed"].sigmoid()).transpose(0, 1)

    def last_level(self, record: FDRRecord, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden_states, references = outputs
        return recomputed_boxes.last_level(record, hidden_states, record.reference_logits[-1]), references[-1:]


class SharedBoxHeadAdapter(DetrexAdapter):
    """Base of the adapters for hosts with one box head. It stays, to locate the initial boxes: nothing retires."""

    reported_norm = "post_norm_layer"

    def first_box_head(self, model: Any) -> nn.Module:
        return model.bbox_embed

    def attach_heads(self, model: Any, num_layers: int, retired: host_parts.Retired) -> None:
        recomputed_boxes.replace_shared_heads(
            model, f"{DECODER}.bbox_embed", "bbox_embed", SharedBoxHead, num_layers, retired
        )

    def deploy_heads(self, model: Any) -> None:
        recomputed_boxes.replace_shared_heads_by_deployed(model, "bbox_embed")


class FDRDabDetrDecoder(QueriesFirstDecoder, DabDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


@register_adapter("projects.dab_detr.modeling.dab_detr.DABDETR")
class DABDetrAdapter(SharedBoxHeadAdapter):
    """DAB-DETR."""

    decoder_classes: ClassVar = {DabDetrTransformerDecoder: FDRDabDetrDecoder}
    criterion_classes: ClassVar = {SetCriterion: GOLSDSetCriterion}
