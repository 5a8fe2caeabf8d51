"""detrex's H-Deformable-DETR, whose one-to-many queries lie behind the others and get a criterion call of their own."""

from typing import Any, ClassVar

from projects.h_deformable_detr.modeling import DeformableCriterion, HDeformableDetrTransformerDecoder
from torch import Tensor

from dfine_plugin.config import FDRConfig
from dfine_plugin.matching import Pairs
from dfine_plugin.registry import register_adapter

from ..host_parts import Host, Retired
from .adapter import DetrexAdapter
from .criterion import GOLSDCriterion
from .decoder import RefiningDecoder


class FDRHDeformableDetrDecoder(RefiningDecoder, HDeformableDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDHybridCriterion(GOLSDCriterion, DeformableCriterion):
    """The host's criterion, fed with a union for each branch.

    The model adds ``_one2many`` to the names of the second branch's terms, and to those in ``weight_dict``. It repeats
    the truths there, end to end; which of the copies a query was matched with is chance, so they count as one truth.
    """

    encoder_is_binary = True
    one_to_many = False
    """Whether this instance, made for one call, serves the one-to-many branch."""
    copies: int
    """How often the one-to-many branch repeats each truth."""

    def losses_of(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        self.one_to_many = "pred_boxes_one2many" not in outputs
        return super().losses_of(outputs, targets, *args)

    def matched_queries(self, outputs: dict[str, Any], known: dict[str, Any] | None) -> slice:
        count = outputs["pred_boxes"].shape[1]
        return slice(-count, None) if self.one_to_many else slice(0, count)

    def distinct(self, pairs: Pairs, targets: list[dict[str, Tensor]]) -> Pairs:
        if not self.one_to_many:
            return pairs
        counts = [max(len(target["boxes"]) // self.copies, 1) for target in targets]
        return [(queries, truths % count) for (queries, truths), count in zip(pairs, counts, strict=True)]


@register_adapter("projects.h_deformable_detr.modeling.h_deformable_detr.HDeformableDETR")
class HDeformableDetrAdapter(DetrexAdapter):
    """H-Deformable-DETR."""

    decoder_classes: ClassVar = {HDeformableDetrTransformerDecoder: FDRHDeformableDetrDecoder}
    criterion_classes: ClassVar = {DeformableCriterion: GOLSDHybridCriterion}

    def attach(self, model: Host, config: FDRConfig) -> Retired:
        retired = super().attach(model, config)
        model.criterion.copies = model.k_one2many
        return retired

    def detach(self, model: Host, retired: Retired) -> None:
        del model.criterion.copies
        super().detach(model, retired)
