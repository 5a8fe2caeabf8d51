"""Parts for hosts whose model computes each level's box a second time, from the decoder's hidden states and references.

Such a model reports ``sigmoid(box_head(hidden) + isig(reference))``. Its box heads give way to heads that look the
refined box up in the forward's record and return ``logit(box) - isig(reference)``, with the very references that the
model will add. Deployed, no record travels: the decoder returns its last level only, with the box and the quality as
further channels of the hidden states.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine_plugin.boxes import straight_through_clamp
from dfine_plugin.record import FDRRecord, current_record, current_scope

from .host_parts import Host, Retired, recast, sharing_copy

LOGIT_EPS = 1e-5
"""The host reports sigmoids, which reach neither 0 nor 1: boxes are held this far inside."""


def logit(boxes: Tensor) -> Tensor:
    """The logits whose sigmoids are the boxes; what lies outside ``(0, 1)`` keeps its gradient."""
    # half precision rounds what is nearer to 1 than its unit to 1, whose logit is infinite
    held = straight_through_clamp(boxes, LOGIT_EPS, 1 - max(LOGIT_EPS, torch.finfo(boxes.dtype).eps))
    return torch.log(held / (1 - held))


def four(centres_or_boxes: Tensor) -> Tensor:
    """The logits of a reference as ``(..., 4)``: a 2-d one moves the centre only."""
    return F.pad(centres_or_boxes, (0, 2)) if centres_or_boxes.shape[-1] == 2 else centres_or_boxes


LARGEST_HALF = 1 - 2**-7
"""The largest reference in float16 that a model may add the logits of. Its ``isig`` of 1 divides by 1e-5 there, which
is infinite, and no delta leads back from that; its derivative there holds ``(1 - x)^-2``, which 65504 bounds."""


def finite_logits(reference: Tensor) -> Tensor:
    """A reference whose logits the model can take."""
    return reference.clamp(max=LARGEST_HALF) if reference.dtype == torch.float16 else reference


def split_initial_reference(reference: Tensor) -> Tensor:
    """The initial reference, for a decoder to go on with, of a model that keeps the tensor and adds its logits by
    itself: in place, that one becomes :func:`finite_logits`."""
    if reference.dtype != torch.float16:
        return reference
    own = reference.clone()
    reference.data.clamp_(max=LARGEST_HALF)  # past autograd: the sigmoid behind it looks at what it gave
    return own


class RecordedBoxHead(nn.Module):
    """In place of the model's box head of one level: the level's refined box, as the delta the model expects.

    The first one is the host's own recast, for it holds the second name of the parameters that the decoder computes the
    initial boxes with.
    """

    level: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        record = current_record()
        return logit(record.boxes[self.level]) - record.reference_logits[self.level]


class RecordedLogits(nn.Module):
    """Mixin before the host's class head of one level: adds the record's location quality to its logits."""

    level: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = super().forward(*args, **kwargs)
        record = current_record()
        if self.level == 0:
            record.initial_logits = logits
        if not record.quality_logits:
            return logits
        return logits + record.quality_logits[self.level].to(logits.dtype)


class RecordedClassifier(RecordedLogits, nn.Linear):
    """The class head of one level, with the record's location quality added to its logits."""


class StackedBoxHead(nn.Module):
    """In place of a model's box head for all levels: their refined boxes, as the deltas that the model expects."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(L, B, Q, 4)``."""
        record = current_record()
        deltas = [logit(boxes) - logits for boxes, logits in zip(record.boxes, record.reference_logits, strict=True)]
        return torch.stack(deltas)


class StackedClassifier(nn.Linear):
    """The model's class head for all levels, with the record's location quality added to its logits."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(L, B, Q, classes)`` for the states of all levels, ``(B, Q, classes)`` for the last level's."""
        record = current_record()
        logits = super().forward(hidden_states)
        of_all = hidden_states.ndim == 4
        if record.initial_logits is None:
            record.initial_logits = (
                logits[0] if of_all else super().forward(current_scope().progress.first_hidden_states)
            )
        if not record.quality_logits:
            return logits
        # all layers', so that those without a loss get a gradient of zero: DistributedDataParallel waits for one
        quality = torch.stack(record.quality_logits)
        return logits + (quality if of_all else quality[-1]).to(logits.dtype)


class DeployedBoxHead(nn.Module):
    """Takes the box delta out of the channels that a deployed decoder adds to its hidden states."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, hidden_states: Tensor) -> Tensor:
        # a copy: hosts add references to it in place
        return hidden_states[..., self.hidden_dim : self.hidden_dim + 4].clone()


class DeployedClassifier(nn.Linear):
    """The host's last class head on the hidden channels, with the quality of the channels behind the box added."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden, _, quality = hidden_states.tensor_split([self.in_features, self.in_features + 4], dim=-1)
        logits = super().forward(hidden)
        return logits + quality if quality.shape[-1] else logits


def with_channels(hidden_states: Tensor, box_delta: Tensor, quality_logits: Sequence[Tensor]) -> Tensor:
    """What :class:`DeployedBoxHead` and :class:`DeployedClassifier` read: hidden states with box and quality behind."""
    further = (box_delta, *quality_logits[-1:])
    return torch.cat([hidden_states, *(part.to(hidden_states.dtype) for part in further)], dim=-1)


def last_level(record: FDRRecord, hidden_states: Tensor, reference_logits: Tensor) -> Tensor:
    """The last of ``(L, B, Q, C)`` hidden states, ``(1, B, Q, C + ...)``, by :func:`with_channels`.

    Args:
        record: of the forward.
        hidden_states: of all levels.
        reference_logits: ``(B, Q, 4)``, what the model will add.
    """
    delta = logit(record.boxes[-1]) - reference_logits
    return with_channels(hidden_states[-1], delta, record.quality_logits)[None]


def level_heads(heads: Sequence[nn.Module], twin: type[nn.Module]) -> list[Any]:
    """For each level a copy of its head that shares its parameters, of another class that knows its level."""
    twins = [sharing_copy(head) for head in heads]
    for level, head in enumerate(twins):
        recast(head, twin)
        head.level = level
    return twins


def replace_heads(
    model: Host,
    decoder: str,
    num_layers: int,
    decoder_heads: list[nn.Module],
    retired: Retired,
    classifier: type[RecordedLogits] = RecordedClassifier,
) -> None:
    """Retire the box heads after the first one, and let the model's heads look up what the decoder has recorded.

    Model and decoder get lists of their own: many hosts let them share one. What follows the levels' heads in a list
    (the encoder's proposal head) stays.

    Args:
        model: the host, with ``bbox_embed`` and ``class_embed``.
        decoder: the dotted name of its decoder, whose own ``bbox_embed`` may be None.
        num_layers: L.
        decoder_heads: the L box heads that the decoder gets; the first holds the host's first head's parameters.
        retired: takes note.
        classifier: what the model's class heads become, a subclass of theirs.
    """
    boxes, classes, own = model.bbox_embed, model.class_embed, model.get_submodule(decoder).bbox_embed
    recorded = level_heads(boxes[:1], RecordedBoxHead)
    for level in range(1, num_layers):
        retired.modules[f"bbox_embed.{level}"] = boxes[level]
        if own is not None:
            retired.modules[f"{decoder}.bbox_embed.{level}"] = own[level]
            retired.box_heads.append(boxes[level])
        recorded.append(RecordedBoxHead())
        recorded[-1].level = level
    encoder = [] if own is None else own[num_layers:]
    labels = level_heads(classes[:num_layers], classifier)
    retired.replace(model, f"{decoder}.bbox_embed", nn.ModuleList([*decoder_heads, *encoder]))
    retired.replace(model, "bbox_embed", nn.ModuleList([*recorded, *boxes[num_layers:]]))
    retired.replace(model, "class_embed", nn.ModuleList([*labels, *classes[num_layers:]]))


def replace_shared_heads(
    model: Host, decoder_head: str, box_head: str, twin: type[nn.Module], num_layers: int, retired: Retired
) -> None:
    """For hosts with one box head for all layers, which stays, to locate the initial boxes: nothing retires.

    Args:
        model: the host, with ``class_embed``, one for all layers as well.
        decoder_head: the dotted name by which the decoder asks for boxes.
        box_head: the name by which the model asks for them; of the same parameters.
        twin: the class that the decoder's head becomes.
        num_layers: L.
        retired: takes note.
    """
    retired.box_heads = [model.get_submodule(box_head)] * (num_layers - 1)
    for name, other in ((decoder_head, twin), (box_head, StackedBoxHead), ("class_embed", StackedClassifier)):
        head = sharing_copy(model.get_submodule(name))
        recast(head, other)
        retired.replace(model, name, head)


def replace_heads_by_deployed(model: Host, num_layers: int) -> None:
    """Leave the model one level: heads that read what :func:`with_channels` gives them."""
    classifier = model.class_embed[num_layers - 1]
    recast(classifier, DeployedClassifier)
    model.class_embed = nn.ModuleList([classifier])
    model.bbox_embed = nn.ModuleList([DeployedBoxHead(classifier.in_features)])


def replace_shared_heads_by_deployed(model: Host, box_head: str, class_head: str = "class_embed") -> None:
    """The same for a model with one box head and one class head for all levels, of these names."""
    classifier = getattr(model, class_head)
    recast(classifier, DeployedClassifier)
    setattr(model, box_head, DeployedBoxHead(classifier.in_features))
