"""Bare RT-DETR of transformers, trained as its authors' is: a layer's boxes teach the layer before, too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dfine_plugin.wrapping import is_wrapped


class _SecondLook:
    """Forward hook of all box heads of a decoder, which are called layer by layer.

    A head's output gets that of the layer before added and, with no gradient, taken away: the box stays, and its loss
    reaches the layer before.
    """

    def __init__(self, heads: nn.ModuleList) -> None:
        self.first, self.last = heads[0], heads[-1]
        self.before: Tensor | None = None

    def __call__(self, head: nn.Module, _: Any, moved: Tensor) -> Tensor:
        before = None if head is self.first else self.before
        self.before = None if head is self.last else moved
        return moved if before is None else moved + (before - before.detach())


def look_forward_twice(model: nn.Module) -> None:
    """Let the loss of a layer's boxes train the box head of the layer before, too, in place; predictions stay.

    A box is ``sigmoid(head_l(h_l) + isig(box_{l-1}))``. transformers detaches ``box_{l-1}``; RT-DETR's authors, as
    DINO's before them (arXiv 2203.03605, section 3.5), only where the next layer attends from it.

    Raises:
        ValueError: the model is no bare RT-DETR or RT-DETRv2 of transformers.
    """
    from transformers import RTDetrForObjectDetection, RTDetrV2ForObjectDetection

    if not isinstance(model, RTDetrForObjectDetection | RTDetrV2ForObjectDetection) or is_wrapped(model):
        raise ValueError(f"{type(model).__name__} is no bare RT-DETR of transformers, which could look forward twice")
    heads = model.model.decoder.bbox_embed
    second_look = _SecondLook(heads)
    for head in heads:
        head.register_forward_hook(second_look)
