"""detrex's DETA: Deformable-DETR, two-stage, whose criterion may assign queries to truths by IoU instead of matching.

Assigned, all layers share the pairs that the initial references have. The initial boxes get them too, and the union is
these pairs, of a query with several truths the first one's.
"""

from typing import Any, ClassVar

from projects.deta.modeling import DeformableDetrTransformerDecoder, DETACriterion
from torch import Tensor, nn

from dfine_plugin.matching import Pairs
from dfine_plugin.registry import register_adapter

from ..host_parts import Host
from .adapter import DetrexAdapter
from .criterion import GOLSDCriterion
from .decoder import RefiningDecoder
from .detector import DetrexDetector


class FDRDETADecoder(RefiningDecoder, DeformableDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class Assigned(nn.Module):
    """In place of matcher and assigner for one call: the pairs that were assigned, whatever the set."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> Pairs:
        return self.pairs


class GOLSDDETACriterion(GOLSDCriterion, DETACriterion):
    """The host's criterion, fed with the union. Its encoder set holds every token, so it keeps its own pairs."""

    class_losses: ClassVar = {}
    encoder_is_binary = True
    stg2_assigner: Any

    def losses_of(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        if self.assign_second_stage:
            # once, for the host draws among the candidates
            self.matcher = self.stg2_assigner = Assigned(self.stg2_assigner(outputs, targets))
        return super().losses_of(outputs, targets, *args)


class DETADetector(DetrexDetector):
    """The same for a host that has a second selection of detections, by NMS."""

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        self.model.nms_inference = self.model.inference


@register_adapter("projects.deta.modeling.deformable_detr.DeformableDETR")
class DETAAdapter(DetrexAdapter):
    """DETA."""

    decoder_classes: ClassVar = {DeformableDetrTransformerDecoder: FDRDETADecoder}
    criterion_classes: ClassVar = {DETACriterion: GOLSDDETACriterion}

    def deploy(self, model: Host) -> None:
        assigns = model.criterion.assign_second_stage
        super().deploy(model)
        model.criterion.assign_second_stage = assigns  # by which the host selects detections

    def detector(self, model: Host) -> nn.Module:
        return DETADetector(model)
