"""A model of detrex as a function of tensors."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..host_parts import Host, sharing_copy


class DetrexDetector(nn.Module):
    """A model's logits and boxes for images ``(B, 3, H, W)`` in its own scale and order of channels, all of one size.

    The model gets a list in place of detectron2's dicts: its own preprocessing gives way to taking the images out of
    it, and its selection of detections to putting logits and boxes in.
    """

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.model: Any = sharing_copy(model)
        # no bound methods: torch would name the model's modules by way of them
        self.model.preprocess_image = partial(_take_images, self.model.normalizer)
        self.model.inference = _put_predictions

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        exchange = [images]
        self.model(exchange)
        _, logits, boxes = exchange
        return logits, boxes


def _take_images(normalise: Callable[[Tensor], Tensor], exchange: list[Tensor]) -> SimpleNamespace:
    # hosts hand the sizes on to their selection of detections
    return SimpleNamespace(tensor=normalise(exchange[0]), image_sizes=exchange)


def _put_predictions(logits: Tensor, boxes: Tensor, exchange: list[Tensor]) -> list[Any]:
    exchange += [logits, boxes]
    return []
