"""detrex's DN-DETR."""

from typing import ClassVar

from projects.dn_detr.modeling import DNCriterion, DNDetrTransformerDecoder

from dfine_plugin.registry import register_adapter

from .criterion import DenoisingOutputs
from .dab_detr import QueriesFirstDecoder, SharedBoxHeadAdapter


class FDRDNDetrDecoder(QueriesFirstDecoder, DNDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDDenoisingCriterion(DenoisingOutputs, DNCriterion):
    """The host's criterion, fed with the union."""


@register_adapter("projects.dn_detr.modeling.dn_detr.DNDETR")
class DNDetrAdapter(SharedBoxHeadAdapter):
    """DN-DETR. Its matched queries use the label embedding of the denoising ones, which thus always has a gradient."""

    decoder_classes: ClassVar = {DNDetrTransformerDecoder: FDRDNDetrDecoder}
    criterion_classes: ClassVar = {DNCriterion: GOLSDDenoisingCriterion}
