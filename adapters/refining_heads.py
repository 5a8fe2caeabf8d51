"""Decoders that run as they are, and refine distributions in their box heads.

Such a decoder asks a box head, layer by layer, for what to add to the reference's logits; the model asks again, on the
levels' hidden states, for what it reports. Both kinds of heads give way to heads that answer
``logit(box) - isig(reference)``, so that what comes out is the refined box: exact, for the reference is the very one
that the host adds. The decoder's answer is detached, as refined references are, from everything but an initial
reference with a gradient, whose gradient it cancels; so nothing leaks where a host looks forward twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dfine_plugin.boxes import at_least_float32
from dfine_plugin.head import FDRHead, Refinement
from dfine_plugin.record import (
    FDRRecord,
    close_scope,
    closes_on_interrupt,
    current_record,
    current_scope,
    in_scope,
    open_scope,
)

from .recomputed_boxes import four, logit


@dataclass
class Progress:
    """How far one run of a decoder has come: what its box heads hand on from layer to layer.

    Attributes:
        fdr: the FDR head.
        inverse_sigmoid: the host's.
        reference_logits: ``(B, Q, 4)``, of the reference that the layer at work attends from.
        record: of the layers so far; None before the first.
        state: of the refinement after the latest layer.
        first_hidden_states: ``(B, Q, C)``, what the model's heads will get of the first layer, if they have to know.
    """

    fdr: FDRHead
    inverse_sigmoid: Callable[[Tensor], Tensor]
    reference_logits: Tensor
    record: FDRRecord | None = None
    state: Refinement | None = None
    first_hidden_states: Tensor | None = None

    def begin(self, delta: Tensor) -> None:
        """Locate the initial boxes: b0 = sigmoid(delta + isig(initial reference)), isig being the host's."""
        initial_boxes = (at_least_float32(delta) + self.reference_logits).sigmoid()
        self.state = self.fdr.start(initial_boxes)
        self.record = FDRRecord(self.fdr.weights, initial_boxes)

    def refine(self, hidden_states: Tensor) -> Tensor:
        """Refine by the next layer, and return what the host has to add to this layer's reference for the next one."""
        assert self.record is not None
        assert self.state is not None
        layer = len(self.record.boxes)
        self.state = self.fdr(layer, hidden_states, self.state)
        assert self.state.probabilities is not None
        self.record.add(self.state, self.fdr.quality_logits(layer, self.state.probabilities))
        self.record.reference_logits.append(self.reference_logits)
        # a host in half precision goes on in it
        boxes = self.state.boxes.detach().to(self.reference_logits.dtype)
        delta = logit(boxes) - self.reference_logits
        # the host's arithmetic, step by step: bit for bit the logits that it will add next
        self.reference_logits = self.inverse_sigmoid((delta + self.reference_logits).detach().sigmoid())
        return delta


def refine_afterwards(fdr: FDRHead, locate: Callable[[Tensor], Tensor], hidden_states: Sequence[Tensor]) -> FDRRecord:
    """The record of all layers, where none attends by what another has refined.

    Args:
        fdr: the FDR head, which says of which layer the initial boxes come.
        locate: the host's own boxes ``(B, Q, 4)``, from ``(B, Q, C)`` of a layer.
        hidden_states: of each layer.
    """
    initial_boxes = locate(hidden_states[fdr.initial_layer - 1])
    state = fdr.start(initial_boxes)
    record = FDRRecord(fdr.weights, initial_boxes)
    for layer, of_layer in enumerate(hidden_states):
        state = fdr(layer, of_layer, state)
        assert state.probabilities is not None
        record.add(state, fdr.quality_logits(layer, state.probabilities))
    return record


@dataclass
class FixedReference:
    """What a decoder whose layers all predict from one reference hands to the model's box head, which all share.

    Attributes:
        reference_logits: ``(B, Q, 4)``, of all layers; None before the decoder has run.
        asked_for: the layer whose boxes the model asks for next, -1 where it begins with the last.
    """

    reference_logits: Tensor | None = None
    asked_for: int = 0

    def boxes_of(self, delta: Tensor) -> Tensor:
        """Boxes from what the host's head adds to the reference: sigmoid(delta + isig(reference))."""
        assert self.reference_logits is not None
        return (at_least_float32(delta) + self.reference_logits).sigmoid()


class FixedReferenceBoxHead(nn.Module):
    """Mixin before the class of such a box head: the refined boxes, as the deltas that the model expects."""

    def locate(self, hidden_states: Tensor) -> Tensor:
        """What the host's own head answers, ``(B, Q, 4)``: it locates the initial boxes."""
        return super().forward(hidden_states)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, Q, 4)``, layer by layer."""
        progress = current_scope().progress
        boxes = current_record().boxes[progress.asked_for]
        progress.asked_for += 1
        return logit(boxes) - progress.reference_logits


class RefiningBoxHead(nn.Module):
    """In place of a decoder's box head after its first one: refines the distributions."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return current_scope().progress.refine(hidden_states)


class InitialBoxHead(nn.Module):
    """Mixin before the class of a decoder's first box head: as the host has it, then the refinement by the first
    layer.

    So too of the only one, where all layers share it: it locates the initial boxes when first called in a run.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        progress = current_scope().progress
        if progress.record is None:
            progress.begin(super().forward(hidden_states))
        return progress.refine(hidden_states)


class RefiningDecoder(nn.Module):
    """Mixin before a host's decoder: its box heads share one :class:`Progress` a run, and leave one record."""

    fdr: FDRHead
    deployed: bool = False

    def inverse_sigmoid(self, reference: Tensor) -> Tensor:
        """The host's ``isig``."""
        raise NotImplementedError

    def initial_reference_logits(self, **inputs: Any) -> Tensor:
        """``isig`` of the initial reference among the decoder's inputs, ``(B, Q, 4)``."""
        return four(self.inverse_sigmoid(inputs["reference_points"]))

    @closes_on_interrupt
    def forward(self, *args, **kwargs):
        if in_scope():
            return self.run(*args, **kwargs)
        # of the decoder's own, where the model's forward has opened none
        open_scope()
        try:
            return self.run(*args, **kwargs)
        finally:
            close_scope()

    def run(self, *args, **kwargs):
        """The host's forward, within a scope."""
        scope = current_scope()
        scope.progress = Progress(self.fdr, self.inverse_sigmoid, self.initial_reference_logits(**kwargs))
        outputs = super().forward(*args, **kwargs)
        scope.record = scope.progress.record
        return self.last_level(scope.record, outputs) if self.deployed else outputs

    def last_level(self, record: FDRRecord, outputs: Any) -> Any:
        """What a deployed decoder returns: one level, for which the model adds the initial reference."""
        raise NotImplementedError
