"""Losses of a host's classes: RT-DETR's own, and MAL in the place of any host's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_plugin.boxes import aligned_iou, at_least_float32
from dfine_plugin.criterion import flatten_pairs
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.losses import matchability_aware_loss
from dfine_plugin.matching import Pairs


class ClassLosses:
    """Mixin before a host's criterion: its loss of classes, or MAL in its place, over the same pairs.

    MAL takes the host's name in the loss dict, and with it the host's weight.
    """

    logits_key = "logits"
    labels_key = "class_labels"
    class_losses: ClassVar[Mapping[str, str]] = {"labels": "loss_ce"}
    """The host's losses of classes, by the names that it asks for them, with their names in the loss dict."""
    class_loss = "host"
    losses: Any
    alpha: float
    gamma: float

    def choose_class_loss(self, class_loss: str) -> None:
        """Take ``"host"`` or ``"mal"``.

        Raises:
            UnsupportedModelError: MAL has no loss of the host's to stand in for.
        """
        if class_loss == "mal" and not any(loss in self.class_losses for loss in self.losses):
            raise UnsupportedModelError(
                f"class_loss='mal' stands in for the loss {' or '.join(self.class_losses)} of this "
                f"{type(self).__name__}, which has {', '.join(self.losses)}"
            )
        self.class_loss = class_loss

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        if self.class_loss == "mal" and loss in self.class_losses:
            matched, iou = self._matched_classes(outputs, targets, indices)
            term = matchability_aware_loss(outputs[self.logits_key], matched, iou, num_boxes)
            return {self.class_losses[loss]: term}
        return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)  # type: ignore[misc]

    def varifocal_loss(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], indices: Pairs, num_boxes: float | Tensor
    ) -> Tensor:
        """RT-DETR's varifocal loss, with the IoU of aligned pairs instead of the diagonal of all against all.

        Cross entropy with a score s is ``softplus(logit) - s logit``, and s is zero but for the pairs: no scores of all
        queries and classes are made, and kept for the backward pass.
        """
        logits = outputs[self.logits_key]
        matched, iou = self._matched_classes(outputs, targets, indices)
        weight = self.alpha * at_least_float32(logits.detach()).sigmoid().pow(self.gamma)
        weight.index_put_(matched, iou.to(weight.dtype))
        loss = (weight * F.softplus(at_least_float32(logits))).sum() - (iou.square() * logits[matched]).sum()
        return loss / num_boxes

    def _matched_classes(
        self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], indices: Pairs
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Images, queries and classes of the pairs, and the IoUs of their boxes."""
        boxes = outputs["pred_boxes"].detach()
        pairs = flatten_pairs(indices, [target["boxes"] for target in targets], boxes.device)
        classes = torch.cat([target[self.labels_key] for target in targets])[pairs.truths]
        iou = aligned_iou(boxes[pairs.images, pairs.queries], pairs.boxes)
        return (pairs.images, pairs.queries, classes), iou
