"""detrex's Align-DETR: DINO's decoder, and a criterion that matches several queries to a truth and weighs them.

Sets of early layers and of the encoder take several queries a truth, the best of which count most. The union is of all
these pairs, and they count alike in its box losses, as in every host; without it the host's weights stay. FGL and DDF
weigh the same pairs by IoU alone.
"""

from typing import Any, ClassVar

from projects.align_detr.modeling import AlignDETRCriterion, TransformerDecoder
from torch import Tensor

from dfine_plugin.criterion import flatten_pairs
from dfine_plugin.matching import Pairs
from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import DenoisingMetas
from .decoder import RefiningDecoder


class FDRAlignDetrDecoder(RefiningDecoder, TransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDAlignCriterion(DenoisingMetas, AlignDETRCriterion):
    """The host's criterion, fed with the union."""

    class_losses: ClassVar = {}
    match_number: list[int]
    places: dict[int, int]
    """Of an instance made for one call: each boxes tensor's layer from 1, 0 for the encoder, by which the host looks up
    how many queries a truth gets."""

    def losses_of(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        sets = [outputs["enc_outputs"], *outputs.get("aux_outputs", []), outputs]
        self.places = {id(predictions["pred_boxes"]): place for place, predictions in enumerate(sets)}
        return super().losses_of(outputs, targets, *args)

    def place(self, outputs: dict[str, Tensor]) -> int:
        """The layer of a prediction set; the first of the initial boxes."""
        return self.places.get(id(outputs["pred_boxes"]), 1)

    def ask(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Pairs:
        return self.matcher(outputs, targets, self.match_number[self.place(outputs)])

    def get_loss(self, outputs, targets, num_boxes, layer_spec, specify_indices=None):  # type: ignore[override]
        # the host counts the initial boxes, one more auxiliary set, as a layer
        place = self.place(outputs)
        losses, indices = AlignDETRCriterion.get_loss(self, outputs, targets, num_boxes, place, specify_indices)
        boxes = outputs["pred_boxes"]
        if id(boxes) not in self.terms:
            truths = [target["boxes"] for target in targets]
            self.taken[id(boxes)] = flatten_pairs(indices, truths, boxes.device), num_boxes
        return losses | self.terms.get(id(boxes), {}), indices


@register_adapter("projects.align_detr.modeling.aligndetr.AlignDETR")
class AlignDetrAdapter(DetrexAdapter):
    """Align-DETR."""

    decoder_classes: ClassVar = {TransformerDecoder: FDRAlignDetrDecoder}
    criterion_classes: ClassVar = {AlignDETRCriterion: GOLSDAlignCriterion}
    reported_norm = "norm"
