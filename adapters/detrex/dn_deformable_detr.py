"""detrex's DN-Deformable-DETR."""

from typing import Any, ClassVar

from projects.dn_deformable_detr.modeling import DNCriterion, DNDeformableDetrTransformerDecoder
from torch import Tensor

from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import DenoisingOutputs
from .decoder import RefiningDecoder


class FDRDNDeformableDetrDecoder(RefiningDecoder, DNDeformableDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDDenoisingCriterion(DenoisingOutputs, DNCriterion):
    """The host's criterion, fed with the union."""


@register_adapter("projects.dn_deformable_detr.modeling.dn_deformable_detr.DNDeformableDETR")
class DNDeformableDetrAdapter(DetrexAdapter):
    """DN-Deformable-DETR."""

    decoder_classes: ClassVar = {DNDeformableDetrTransformerDecoder: FDRDNDeformableDetrDecoder}
    criterion_classes: ClassVar = {DNCriterion: GOLSDDenoisingCriterion}

    def denoising_parameters(self, model: Any) -> list[Tensor]:
        return list(model.denoising_generator.parameters())
