"""Checks of what comes into the loss, which name the culprit when they fail."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidTargetError, NonFiniteError

LARGEST_COORDINATE = 2.0
"""In image sides. A box that an augmentation carried over the border stays well below, a box in pixels well above."""
TOLERANCE = 1e-3
"""In image sides: how far beyond the border a box may come to lie by rounding."""


def check_targets(
    targets: Sequence[Mapping[str, Any]],
    num_classes: int | Tensor,
    labels_key: str,
    boxes_key: str,
    images: Sequence[Tensor] | Tensor | None = None,
) -> None:
    """Refuse ground truths that no loss can use, and images that are not finite, before the host computes with them,
    and takes them into the statistics of its batch norms. Reads the truths' device once.

    A box that reaches beyond its image is warned of, once a process: losses can use it.

    Args:
        targets: for each image a mapping with labels ``(n,)`` int and boxes ``(n, 4)`` cxcywh in image sides; ``(0,)``
            where there are none.
        num_classes: labels lie in ``[0, num_classes)``; ``(B,)`` where each image has classes of its own.
        labels_key, boxes_key: the host's keys of the two.
        images: as many as targets.

    Raises:
        InvalidTargetError: names the image, the truth and its value.
        NonFiniteError: names the images, and how much of them is not finite.
    """
    _check_structure(targets, labels_key, boxes_key, None if images is None else len(images))
    if not targets:
        return
    labels = torch.cat([target[labels_key] for target in targets])
    boxes = torch.cat([target[boxes_key].reshape(-1, 4) for target in targets])
    bounds = num_classes
    if isinstance(num_classes, Tensor):
        bounds = torch.cat([n.expand(len(target[labels_key])) for n, target in zip(num_classes, targets, strict=True)])
    wrong_label = (labels < 0) | (labels >= bounds)
    wrong_box = ~boxes.isfinite().all(-1) | (boxes[:, 2:] <= 0).any(-1) | (boxes.abs() > LARGEST_COORDINATE).any(-1)
    verdicts = torch.stack([(wrong_label | wrong_box).any(), _beyond(boxes).any()])
    pixels = FiniteCheck({f"image {i}": x for i, x in enumerate(() if images is None else images) if _can_be_nan(x)})
    crossed = torch.cat([verdicts, pixels.sums.to(verdicts.device)]).cpu()  # the only wait for the device
    is_wrong, is_beyond = crossed[:2].bool().tolist()
    pixels.settle(crossed[2:])
    if is_wrong:
        _name_culprit(targets, num_classes, labels_key, boxes_key)
    if is_beyond:
        _warn_beyond(targets, boxes_key)


def _check_structure(
    targets: Sequence[Mapping[str, Any]], labels_key: str, boxes_key: str, num_images: int | None
) -> None:
    """What shapes and types alone tell."""
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise InvalidTargetError(f"labels must be a list with one mapping an image, got a {type(targets).__name__}")
    if num_images is not None and len(targets) != num_images:
        raise InvalidTargetError(f"labels of {len(targets)} images for a batch of {num_images}")
    for image, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise InvalidTargetError(f"image {image}: its labels must be a mapping, got a {type(target).__name__}")
        if missing := [key for key in (labels_key, boxes_key) if key not in target]:
            raise InvalidTargetError(
                f"image {image}: no {' and no '.join(missing)} among {', '.join(map(str, target))}"
            )
        labels, boxes = target[labels_key], target[boxes_key]
        for key, value in ((labels_key, labels), (boxes_key, boxes)):
            if not isinstance(value, Tensor):
                raise InvalidTargetError(f"image {image}: {key} must be a tensor, got a {type(value).__name__}")
        if boxes.shape == (0,):
            boxes = boxes.reshape(0, 4)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise InvalidTargetError(
                f"image {image}: {boxes_key} must be (n, 4) and {labels_key} (n,), "
                f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        # torch indexes with uint8 as with bool
        if len(labels) and (labels.is_floating_point() or labels.dtype in (torch.bool, torch.uint8)):
            raise InvalidTargetError(f"image {image}: {labels_key} must be integers (torch.int64), got {labels.dtype}")


def _name_culprit(
    targets: Sequence[Mapping[str, Any]], num_classes: int | Tensor, labels_key: str, boxes_key: str
) -> None:
    bounds = num_classes.tolist() if isinstance(num_classes, Tensor) else [num_classes] * len(targets)
    for image, target in enumerate(targets):
        for index, (label, box) in enumerate(zip(target[labels_key].tolist(), target[boxes_key].tolist(), strict=True)):
            where = f"image {image}, truth {index}"
            if not 0 <= label < bounds[image]:
                raise InvalidTargetError(f"{where}: label {label} is out of range for {bounds[image]} classes")
            if not all(abs(value) < float("inf") for value in box):
                raise InvalidTargetError(f"{where}: box {box} is not finite")
            if min(box[2:]) <= 0:
                raise InvalidTargetError(f"{where}: box {box} (cx, cy, w, h) has no area")
            if max(map(abs, box)) > LARGEST_COORDINATE:
                raise InvalidTargetError(
                    f"{where}: box {box} looks like pixels; boxes are (cx, cy, w, h) in units of the image side"
                )


def _can_be_nan(image: Tensor) -> bool:
    return isinstance(image, Tensor) and image.is_floating_point()


def _beyond(boxes: Tensor) -> Tensor:
    """Whether each of the boxes ``(n, 4)`` cxcywh reaches beyond the image."""
    return ((boxes[:, :2] - 0.5).abs() + boxes[:, 2:] / 2 > 0.5 + TOLERANCE).any(-1)


_warned_beyond = False


def _warn_beyond(targets: Sequence[Mapping[str, Any]], boxes_key: str) -> None:
    """Name the first of the boxes that reach beyond their images, the first time only."""
    global _warned_beyond
    if _warned_beyond:
        return
    _warned_beyond = True
    for image, target in enumerate(targets):
        for index, box in enumerate(target[boxes_key]):
            if _beyond(box[None]).item():
                values = [round(value, 4) for value in box.tolist()]
                warnings.warn(
                    f"image {image}, truth {index}: box {values} (cx, cy, w, h) reaches beyond the image; boxes are "
                    "usually cut at its border. Further ones are not warned of",
                    stacklevel=2,
                )
                return


class FiniteCheck:
    """A check for NaN and infinity in two steps: sums where the tensors lie, the verdict when the sums are on the CPU.

    So the sums can cross in one copy with what has to cross anyway, and the check alone waits for no device.

    Args:
        tensors: by a name that tells tensor and layer, such as ``"boxes of decoder layer 2"``.

    Attributes:
        sums: ``(T,)`` float32, one for each tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        # a sum is NaN or infinite as soon as one element is, and reads each tensor once without a mask of its size
        sums = [tensor.sum(dtype=torch.float32) for tensor in self.tensors.values()]
        self.sums = torch.stack(sums) if sums else torch.zeros(0)

    def settle(self, sums: Tensor) -> None:
        """Refuse what is not finite.

        Args:
            sums: :attr:`sums`, brought to the CPU.

        Raises:
            NonFiniteError: names every tensor that is not finite, and how much of it.
        """
        if bool(sums.isfinite().all()):
            return
        culprits = [
            f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} values)"
            for name, tensor in self.tensors.items()
            if not bool(tensor.isfinite().all())
        ]
        # without a culprit, finite values add up beyond float32
        if culprits:
            raise NonFiniteError(f"not finite: {', '.join(culprits)}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Both steps of :class:`FiniteCheck` at once."""
    check = FiniteCheck(tensors)
    check.settle(check.sums.cpu())
