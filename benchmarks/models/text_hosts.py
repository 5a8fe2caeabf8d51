"""Grounding DINOs as hosts that take images alone: their text, always the same one, has the class names.

Their proposals are trained, which transformers' are not: see :func:`with_trainable_proposals`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GroundingDinoForObjectDetection,
    MMGroundingDinoForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
)

from dfine_plugin.adapters.transformers.prompt import class_logits, fix_prompt, phrases, token_shares

CLS, SEP, STOP = 101, 102, 1012
"""BERT's tokens, by which the hosts tell phrases apart."""

FIRST_NAME = 1030
"""The token of the first class: a name is one token, behind all that BERT has for delimiters."""


def with_trainable_proposals(model: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """Forward hook: in training, the encoder's loss is of the selected proposals' own scores and boxes.

    As the authors' (`hs_enc`, `ref_enc`). transformers gives that loss the similarities of the learned queries and
    detached boxes, from which nothing that makes proposals can learn: from scratch, they lie anywhere.

    Args:
        model: the host without its heads.
        inputs: not looked at.
        outputs: the host's, with ``encoder_logits`` ``(B, Q, T)`` and ``encoder_pred_boxes`` ``(B, Q, 4)`` of its own.
    """
    if model.training:
        scores, boxes = outputs.enc_outputs_class, outputs.enc_outputs_coord_logits
        selected = scores.amax(-1).topk(outputs.encoder_logits.shape[1], dim=1).indices[..., None]
        outputs.encoder_logits = scores.take_along_dim(selected, dim=1)
        outputs.encoder_pred_boxes = boxes.take_along_dim(selected, dim=1).sigmoid()
    return outputs


class Prompted(PreTrainedModel):
    """Mixin before a host: without a text its forward takes that of the config's classes, and has a logit for each."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model.register_forward_hook(with_trainable_proposals)
        assert config.id2label is not None
        names = [token for number in range(len(config.id2label)) for token in (FIRST_NAME + number, STOP)]
        text = torch.tensor([CLS, *names, SEP])
        fix_prompt(self, text[None])
        self.text: Tensor
        self.shares: Tensor
        self.register_buffer("text", text[None], persistent=False)
        (shares,) = token_shares([phrases(text)])
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, pixel_values: Tensor, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        if input_ids is not None:
            return super().forward(pixel_values, input_ids, **inputs)
        outputs = super().forward(pixel_values, self.text.expand(len(pixel_values), -1), **inputs)
        outputs.logits = self.of_classes(outputs.logits)
        return outputs

    def of_classes(self, logits: Tensor) -> Tensor:
        """Logits ``(..., K)`` of the classes from those ``(..., T)`` of the text's tokens."""
        return class_logits(logits, self.shares)


class PromptedGroundingDinoForObjectDetection(Prompted, GroundingDinoForObjectDetection):
    """Grounding DINO."""


class PromptedMMGroundingDinoForObjectDetection(Prompted, MMGroundingDinoForObjectDetection):
    """MM Grounding DINO."""
