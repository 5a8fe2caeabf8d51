"""detrex's DINO. Its decoder refines on un-normed states and its model reports on normed ones, looking forward twice;
wrapped, both give the box that was refined on the un-normed states."""

from typing import ClassVar

from projects.dino.modeling import DINOCriterion, DINOTransformerDecoder

from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import DenoisingMetas
from .decoder import RefiningDecoder


class FDRDINODecoder(RefiningDecoder, DINOTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDDINOCriterion(DenoisingMetas, DINOCriterion):
    """The host's criterion, fed with the union."""


@register_adapter("projects.dino.modeling.dino.DINO")
class DINOAdapter(DetrexAdapter):
    """DINO."""

    decoder_classes: ClassVar = {DINOTransformerDecoder: FDRDINODecoder}
    criterion_classes: ClassVar = {DINOCriterion: GOLSDDINOCriterion}
    reported_norm = "norm"
