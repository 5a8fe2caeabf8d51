"""detrex's Focus-DETR: DINO's decoder behind an encoder of foreground tokens, whose scores have a loss of their own."""

from typing import ClassVar

from projects.focus_detr.modeling import FOCUS_DETRCriterion, FOCUS_DETRTransformerDecoder

from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import DenoisingMetas
from .decoder import RefiningDecoder


class FDRFocusDetrDecoder(RefiningDecoder, FOCUS_DETRTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDFocusCriterion(DenoisingMetas, FOCUS_DETRCriterion):
    """The host's criterion, fed with the union."""


@register_adapter("projects.focus_detr.modeling.focus_detr.FOCUS_DETR")
class FocusDetrAdapter(DetrexAdapter):
    """Focus-DETR."""

    decoder_classes: ClassVar = {FOCUS_DETRTransformerDecoder: FDRFocusDetrDecoder}
    criterion_classes: ClassVar = {FOCUS_DETRCriterion: GOLSDFocusCriterion}
    reported_norm = "norm"
