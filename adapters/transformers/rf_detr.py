"""RF-DETR of Hugging Face transformers: LW-DETR's decoder, heads and loss on another backbone."""

from typing import Any, ClassVar

from torch import nn
from transformers.models.rf_detr import modeling_rf_detr

from dfine_plugin.registry import register_adapter

from .lw_detr import LwDetrAdapter, RecordedBoxHead, RefiningAfterwards


class FDRRfDetrDecoder(RefiningAfterwards, modeling_rf_detr.RfDetrDecoder):
    """RF-DETR's decoder, refining distributions."""


class RecordedRfDetrBoxHead(RecordedBoxHead, modeling_rf_detr.RfDetrMLPPredictionHead):
    """RF-DETR's box head."""


@register_adapter("transformers.models.rf_detr.modeling_rf_detr.RfDetrForObjectDetection")
class RfDetrAdapter(LwDetrAdapter):
    """RF-DETR."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        modeling_rf_detr.RfDetrDecoder: FDRRfDetrDecoder
    }
    box_head_classes: ClassVar[dict[type[nn.Module], type[Any]]] = {
        modeling_rf_detr.RfDetrMLPPredictionHead: RecordedRfDetrBoxHead
    }
