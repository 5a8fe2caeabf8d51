"""Decoders of detrex, refining distributions in their box heads: see :mod:`~dfine_plugin.adapters.refining_heads`."""

from detrex.layers import MLP
from detrex.utils import inverse_sigmoid
from torch import Tensor

from dfine_plugin.record import FDRRecord

from .. import recomputed_boxes, refining_heads
from ..recomputed_boxes import logit


class InitialBoxHead(refining_heads.InitialBoxHead, MLP):
    """The decoder's first box head."""


class RefiningDecoder(refining_heads.RefiningDecoder):
    """Mixin before a host's decoder, which returns hidden states and references, ``(L, B, Q, …)`` each."""

    def inverse_sigmoid(self, reference: Tensor) -> Tensor:
        return inverse_sigmoid(reference)

    def last_level(self, record: FDRRecord, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden_states, references = outputs
        delta = logit(record.boxes[-1]) - record.reference_logits[0]
        channels = recomputed_boxes.with_channels(hidden_states[-1], delta, record.quality_logits)
        return channels[None], references[-1:]
