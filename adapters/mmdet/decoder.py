"""Decoders of MMDetection, refining distributions in their box heads: see :mod:`~dfine_plugin.adapters.refining_heads`.

A decoder gets the list of the model's box heads as an argument, and asks one a layer.
"""

from functools import partial

from mmdet.models.layers import DeformableDetrTransformerDecoder, DinoTransformerDecoder
from mmdet.models.layers.transformer.utils import inverse_sigmoid
from torch import Tensor, nn

from dfine_plugin.record import FDRRecord

from .. import recomputed_boxes, refining_heads


class InitialBoxHead(refining_heads.InitialBoxHead, nn.Sequential):
    """The first box head."""


class RefiningDecoder(refining_heads.RefiningDecoder):
    """Mixin before a host's decoder, which returns hidden states and references, ``(L, B, Q, …)`` each."""

    inverse_sigmoid = staticmethod(inverse_sigmoid)

    def last_level(self, record: FDRRecord, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden_states, references = outputs
        of_last = recomputed_boxes.with_channels(hidden_states[-1], record.boxes[-1], record.quality_logits)
        return of_last[None], references[-1:]


class FDRDeformableDetrDecoder(RefiningDecoder, DeformableDetrTransformerDecoder):
    """Deformable-DETR's decoder, refining distributions."""


class FDRDinoDecoder(RefiningDecoder, DinoTransformerDecoder):
    """DINO's decoder, refining distributions. It refines on states that the model's heads see normed."""

    inverse_sigmoid = staticmethod(partial(inverse_sigmoid, eps=1e-3))
