"""Decoders of detrex, refining distributions in their box heads: see :mod:`~dfine_plugin.adapters.refining_heads`."""

from detrex.layers import MLP
from detrex.utils import inverse_sigmoid
from torch import Tensor

from dfine_plugin.record import FDRRecord

from .. import recomputed_boxes, refining_heads


class InitialBoxHead(refining_heads.InitialBoxHead, MLP):
    """The decoder's first box head."""


class RefiningDecoder(refining_heads.RefiningDecoder):
    """Mixin before a host's decoder, which returns hidden states and references, ``(L, B, Q, …)`` each."""

    def inverse_sigmoid(self, reference: Tensor) -> Tensor:
        return inverse_sigmoid(reference)

    def last_level(self, record: FDRRecord, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden_states, references = outputs
        return recomputed_boxes.last_level(record, hidden_states, record.reference_logits[0]), references[-1:]
