"""detrex's DAB-Deformable-DETR, one-stage and two-stage."""

from typing import ClassVar

from projects.dab_deformable_detr.modeling import DabDeformableDetrTransformerDecoder, TwoStageCriterion

from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import GOLSDCriterion
from .decoder import RefiningDecoder


class FDRDabDeformableDetrDecoder(RefiningDecoder, DabDeformableDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDTwoStageCriterion(GOLSDCriterion, TwoStageCriterion):
    """The host's criterion, fed with the union."""

    encoder_is_decoded = True


@register_adapter("projects.dab_deformable_detr.modeling.dab_deformable_detr.DabDeformableDETR")
class DabDeformableDetrAdapter(DetrexAdapter):
    """DAB-Deformable-DETR."""

    decoder_classes: ClassVar = {DabDeformableDetrTransformerDecoder: FDRDabDeformableDetrDecoder}
    criterion_classes: ClassVar = {TwoStageCriterion: GOLSDTwoStageCriterion}
