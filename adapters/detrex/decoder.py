"""Decoders of detrex, refining distributions."""

from typing import Any

from detrex.layers import MLP
from detrex.utils import inverse_sigmoid
from torch import Tensor

from dfine_plugin.record import FDRRecord

from .. import recomputed_boxes, refining_decoder


class InitialBoxHead(refining_decoder.InitialBoxHead, MLP):
    """The decoder's first box head, as the host has it, then the refinement by the first layer."""


class RefiningDecoder(refining_decoder.RefiningDecoder):
    """Mixin before a host's decoder, which returns the levels' hidden states and references."""

    inverse_sigmoid = staticmethod(inverse_sigmoid)

    def initial_reference_logits(self, **inputs: Any) -> Tensor:
        return recomputed_boxes.four(inverse_sigmoid(inputs["reference_points"]))

    def last_level(self, record: FDRRecord, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See the base. The model adds the initial reference to the box of a single level."""
        hidden_states, references = outputs
        return recomputed_boxes.last_level(record, hidden_states, record.reference_logits[0]), references[-1:]
