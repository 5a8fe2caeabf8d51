"""MM Grounding DINO of Hugging Face transformers: Grounding DINO's decoder and loss, another scale of class logits."""

from typing import ClassVar

from torch import nn
from transformers.models.mm_grounding_dino import modeling_mm_grounding_dino as host

from dfine_plugin.registry import register_adapter

from ..recomputed_boxes import RecordedLogits
from ..refining_heads import InitialBoxHead
from .grounding_dino import DeployedLogits, GroundingDinoAdapter, RefiningDecoder


class FDRMMGroundingDinoDecoder(RefiningDecoder, host.MMGroundingDinoDecoder):
    """MM Grounding DINO's decoder, refining distributions."""


class InitialMMGroundingDinoBoxHead(InitialBoxHead, host.MMGroundingDinoMLPPredictionHead):
    """The decoder's first box head."""


class RecordedMMGroundingDinoClassHead(RecordedLogits, host.MMGroundingDinoContrastiveEmbedding):
    """The model's class head of one level."""


class DeployedMMGroundingDinoClassHead(DeployedLogits, host.MMGroundingDinoContrastiveEmbedding):
    """The deployed model's class head."""


@register_adapter("transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoForObjectDetection")
class MMGroundingDinoAdapter(GroundingDinoAdapter):
    """MM Grounding DINO."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        host.MMGroundingDinoDecoder: FDRMMGroundingDinoDecoder
    }
    initial_box_head = InitialMMGroundingDinoBoxHead
    recorded_class_head = RecordedMMGroundingDinoClassHead
    deployed_class_head = DeployedMMGroundingDinoClassHead
