"""Decoders of RT-DETR's own repository, refining distributions in a loop of their own around the same layers.

The decoder gets its heads as arguments and computes boxes and class logits itself, so there is no more to replace.
"""

from importlib.util import find_spec
from typing import Any

import torch
from src.zoo.rtdetr import rtdetr_decoder
from torch import nn

from dfine_plugin.errors import WrapStateError
from dfine_plugin.head import FDRHead, locate_initial_boxes
from dfine_plugin.record import FDRRecord, closes_on_interrupt, current_record, current_scope, leave_record

from .criterion import HANDOVER, Handover


class RefiningLoop:
    """The host's decoder loop with the FDR head in it; a mixin before the host's decoder class."""

    fdr: FDRHead
    layers: Any
    eval_idx: int
    training: bool
    deployed: bool = False

    def forward(self, target, ref_points_unact, *inputs, attn_mask=None, memory_mask=None):
        """Boxes and class logits, ``(L, B, Q, …)`` each: of all layers in training, else of the one evaluated.

        Args:
            target: ``(B, Q, C)``, the queries.
            ref_points_unact: ``(B, Q, 4)``, logits of the initial references.
            inputs: features, their sizes, and with version 1's decoder where their levels start; then the lists of box
                heads and class heads, and the head of the queries' positions.
            attn_mask, memory_mask: what the host gives each layer besides.
        """
        *features, box_heads, class_heads, position_head = inputs
        if self.training and self.deployed:
            raise WrapStateError("a deployed model is for inference only: keep it in evaluation mode")
        reported = range(len(self.layers)) if self.training else [self.eval_idx]
        reference = ref_points_unact.sigmoid()
        boxes, class_logits = [], []
        for index in range(reported[-1] + 1):
            position = position_head(reference)
            layer = self.layers[index]
            target = layer(target, reference.unsqueeze(2), *features, attn_mask, memory_mask, position)
            if index == 0:
                initial_boxes = locate_initial_boxes(box_heads[0](target), reference)
                state = self.fdr.start(initial_boxes)
                record = FDRRecord(self.fdr.weights, initial_boxes)
            state = self.fdr(index, target, state)
            reference = state.boxes.detach().to(reference.dtype)
            record.add(state)
            if index in reported:
                logits = class_heads[index](target)
                if index == 0:
                    record.initial_logits = logits
                quality = self.fdr.quality_logits(index, state.probabilities)
                class_logits.append(logits if quality is None else logits + quality.to(logits.dtype))
                boxes.append(state.boxes)
        leave_record(record)
        return torch.stack(boxes), torch.stack(class_logits)


class HandingOver:
    """Mixin before the class of the host's transformer: its outputs in training carry what the loss needs."""

    decoder: RefiningLoop
    training: bool

    @closes_on_interrupt
    def forward(self, feats, targets=None):
        outputs = super().forward(feats, targets)  # type: ignore[misc]
        if self.training:
            outputs[HANDOVER] = Handover(current_record(), self.decoder.fdr.config, current_scope().idle)
        return outputs


class FDRTransformerDecoder(RefiningLoop, rtdetr_decoder.TransformerDecoder):
    """RT-DETR's decoder, refining distributions."""


class FDRRTDETRTransformer(HandingOver, rtdetr_decoder.RTDETRTransformer):
    """What holds RT-DETR's decoder and heads."""


DECODERS: dict[type[nn.Module], type[nn.Module]] = {rtdetr_decoder.TransformerDecoder: FDRTransformerDecoder}
"""From each host decoder class to its subclass that refines distributions."""
TRANSFORMERS: dict[type[nn.Module], type[nn.Module]] = {rtdetr_decoder.RTDETRTransformer: FDRRTDETRTransformer}
"""From the class of what holds decoder and heads to its subclass that hands over."""

if find_spec("src.zoo.rtdetr.rtdetrv2_decoder") is not None:  # the folder of version 2, which holds both
    from src.zoo.rtdetr import rtdetrv2_decoder

    class FDRTransformerDecoderv2(RefiningLoop, rtdetrv2_decoder.TransformerDecoder):
        """RT-DETRv2's decoder, refining distributions."""

    class FDRRTDETRTransformerv2(HandingOver, rtdetrv2_decoder.RTDETRTransformerv2):
        """What holds RT-DETRv2's decoder and heads."""

    DECODERS[rtdetrv2_decoder.TransformerDecoder] = FDRTransformerDecoderv2
    TRANSFORMERS[rtdetrv2_decoder.RTDETRTransformerv2] = FDRRTDETRTransformerv2
