"""What the way to ONNX changed: the same detections, in pixels, from torch and from onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..registry import find_adapter
from .postprocess import select_detections

NUM_DETECTIONS = 100
"""As many of an image's detections are compared, and evaluated by COCO's rules."""

LARGEST_MOVE = 0.5
"""Pixels that the 99th percentile of box edges may move by."""


class Detections(NamedTuple):
    """An image's detections: scores ``(n,)``, labels ``(n,)``, boxes ``(n, 4)`` xyxy in pixels of the graph's input."""

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray

    def above(self, threshold: float) -> Detections:
        """Those with a score of the threshold or more."""
        return Detections(*(values[self.scores >= threshold] for values in self))

    def finite(self) -> Detections:
        """Those with a finite box."""
        kept = np.isfinite(self.boxes).all(-1)
        return Detections(*(values[kept] for values in self))


@dataclass(frozen=True)
class Parity:
    """How far detections moved, over all images.

    Attributes:
        num_images: that were compared.
        num_detections: confident ones of torch's.
        num_lost: of these, those that the graph does not report with that label.
        max_move, p99_move, mean_move: of the edges of the others' boxes, in pixels.
        max_score_change: of the others.
    """

    num_images: int
    num_detections: int
    num_lost: int
    max_move: float
    p99_move: float
    mean_move: float
    max_score_change: float

    @property
    def passed(self) -> bool:
        """Whether nothing was lost and boxes are where they were, to :data:`LARGEST_MOVE`."""
        return self.num_lost == 0 and self.p99_move <= LARGEST_MOVE

    def __str__(self) -> str:
        return (
            f"{self.num_detections} confident detections on {self.num_images} images: {self.num_lost} lost; box edges "
            f"moved by {self.mean_move:.4f} px on average, {self.p99_move:.4f} at the 99th percentile, "
            f"{self.max_move:.4f} at most; scores by {self.max_score_change:.5f} at most"
        )


def torch_detections(
    model: nn.Module, images: Iterable[Tensor], num_detections: int = NUM_DETECTIONS
) -> list[Detections]:
    """The best so many detections of a model, wrapped or bare, deployed or not, on images ``(3, H, W)``."""
    detector = find_adapter(model).detector(model)
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for image in images:
            logits, boxes = detector(image[None].to(device))
            found.append(best_detections(logits[0].cpu(), boxes[0].cpu(), image, num_detections))
    return found


def onnx_detections(
    path: str | Path, images: Iterable[Tensor], providers: Sequence[str] = ("CPUExecutionProvider",)
) -> list[Detections]:
    """What a graph of :func:`~dfine_plugin.export.export_onnx` detects on images ``(3, H, W)``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    # a graph of a fixed batch gets copies of one image
    batch = session.get_inputs()[0].shape[0]
    count = batch if isinstance(batch, int) else 1
    found = []
    for image in images:
        feed = {"images": np.stack([image.numpy()] * count)}
        if len(session.get_inputs()) == 2:
            feed["target_sizes"] = np.array([image.shape[-2:]] * count)
            scores, labels, boxes = session.run(["scores", "labels", "boxes"], feed)
            found.append(Detections(scores[0], labels[0], boxes[0]))
        else:
            logits, boxes = session.run(["logits", "boxes"], feed)
            found.append(best_detections(torch.from_numpy(logits[0]), torch.from_numpy(boxes[0]), image))
    return found


def best_detections(logits: Tensor, boxes: Tensor, image: Tensor, num_detections: int = NUM_DETECTIONS) -> Detections:
    """The best so many detections of an image.

    Args:
        logits: ``(Q, classes)``.
        boxes: ``(Q, 4)`` cxcywh in image sides.
        image: ``(3, H, W)``, whose pixels the result is in.
    """
    count = min(num_detections, logits.numel())
    size = torch.tensor([image.shape[-2:]])
    selected = select_detections(logits[None].float(), boxes[None].float(), size, count)
    return Detections(*(values[0].numpy() for values in selected))


def measure_parity(expected: Sequence[Detections], found: Sequence[Detections], threshold: float = 0.3) -> Parity:
    """Compare the confident detections of torch with the graph's.

    In each image they are matched by label and box, so that it does not matter which query reports an object. Against
    detections that fall just below the threshold, the graph's count from half of it.

    Args:
        expected: torch's, image by image.
        found: the graph's; what is not finite of them counts as not reported.
        threshold: on the score.

    Raises:
        ValueError: no detection reaches the threshold: there is nothing to compare, as with a model that has not been
            trained, whose queries are all alike.
    """
    moves: list[np.ndarray] = []
    changes: list[np.ndarray] = []
    total = lost = 0
    for image_expected, image_found in zip(expected, found, strict=True):
        ours, theirs = image_expected.above(threshold), image_found.finite().above(threshold / 2)
        total += len(ours.scores)
        distance = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(-1)
        # a pair of different labels is worse than any of the same
        mismatch = ours.labels[:, None] != theirs.labels[None]
        apart = 1 + distance.max(initial=0.0)
        rows, columns = linear_sum_assignment(distance + apart * len(ours.scores) * mismatch)
        same = ~mismatch[rows, columns]
        rows, columns = rows[same], columns[same]
        lost += len(ours.scores) - len(rows)
        moves.append(np.abs(ours.boxes[rows] - theirs.boxes[columns]).ravel())
        changes.append(np.abs(ours.scores[rows] - theirs.scores[columns]))
    if not total:
        raise ValueError(
            f"no detection has a score of {threshold} or more: parity needs a trained model and its images"
        )
    edges, scores = np.concatenate(moves), np.concatenate(changes)
    if not len(edges):
        edges = scores = np.array([np.inf])
    return Parity(
        num_images=len(expected),
        num_detections=total,
        num_lost=lost,
        max_move=float(edges.max()),
        p99_move=float(np.percentile(edges, 99)),
        mean_move=float(edges.mean()),
        max_score_change=float(scores.max()),
    )
