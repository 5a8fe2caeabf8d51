"""detrex's Deformable-DETR: two-stage, with box refinement, and plain by explicit consent."""

from typing import ClassVar

from projects.deformable_detr.modeling import DeformableCriterion, DeformableDetrTransformerDecoder

from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import GOLSDCriterion
from .decoder import RefiningDecoder


class FDRDeformableDetrDecoder(RefiningDecoder, DeformableDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDDeformableCriterion(GOLSDCriterion, DeformableCriterion):
    """The host's criterion, fed with the union. Its encoder set holds every token, so it keeps its own pairs."""

    encoder_is_binary = True


@register_adapter("projects.deformable_detr.modeling.deformable_detr.DeformableDETR")
class DeformableDetrAdapter(DetrexAdapter):
    """Deformable-DETR."""

    decoder_classes: ClassVar = {DeformableDetrTransformerDecoder: FDRDeformableDetrDecoder}
    criterion_classes: ClassVar = {DeformableCriterion: GOLSDDeformableCriterion}
