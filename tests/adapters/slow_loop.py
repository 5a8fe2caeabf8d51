"""An own, slow account of what a wrapped host computes, from the design's formulas.

It shares the hosts' layers and heads with the adapters and nothing else: boxes, distributions, matching (torchvision's
IoUs, scipy's solver), the union, and every loss are written out here, most of them pair by pair.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou
from torchvision.ops import box_iou as pairwise_iou

Pairs = list[list[tuple[int, int]]]
Phrases = Sequence[Sequence[int]] | None
"""For each class its tokens, where class logits are of tokens."""


@dataclass
class Predictions:
    """Of all layers: boxes and class logits as lists, distributions' logits for FGL and DDF, and the initial set."""

    boxes: list[Tensor]
    logits: list[Tensor]
    corner_logits: list[Tensor]
    initial_boxes: Tensor
    initial_logits: Tensor

    def part(self, queries: slice) -> "Predictions":
        return Predictions(
            [b[:, queries] for b in self.boxes],
            [x[:, queries] for x in self.logits],
            [z[:, queries] for z in self.corner_logits],
            self.initial_boxes[:, queries],
            self.initial_logits[:, queries],
        )


def isig(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps)) - torch.log((1 - x).clamp(min=eps))


def reported(boxes: Tensor) -> Tensor:
    """Boxes as a host can report them, by sigmoids: held inside the image by a hair, the gradient not."""
    return torch.where((boxes - 0.5).abs() > 0.5 - 1e-5, boxes.clamp(1e-5, 1 - 1e-5) + boxes - boxes.detach(), boxes)


def first_head(head: Any) -> Any:
    """The host's three-layer perceptron, whatever it has been made part of."""

    def forward(x: Tensor) -> Tensor:
        *before, last = head.layers
        for linear in before:
            x = linear(x).relu()
        return last(x)

    return forward


class SlowFDR:
    """The refinement of the design's section 1, layer by layer, with the weights of an FDR head."""

    def __init__(self, fdr: Any) -> None:
        self.fdr, self.config = fdr, fdr.config
        self.w_of_n = self.config.bin_values().tolist()
        self.out = Predictions([], [], [], torch.empty(0), torch.empty(0))
        self.z: Tensor | float = 0.0
        self.supervised: Tensor | float = 0.0
        self.previous: Tensor | float = 0.0

    def locate(self, moved: Tensor, reference: Tensor, eps: float) -> Tensor:
        """The initial boxes, from what the first box head answers."""
        shift = isig(reference, eps)
        if reference.shape[-1] == 2:
            return torch.cat([moved[..., :2] + shift, moved[..., 2:]], -1).sigmoid()
        return (moved + shift).sigmoid()

    def layers(
        self,
        states: Sequence[Tensor],
        delta: Callable[[Tensor], Tensor],
        reference: Tensor,
        eps: float,
        logits: Sequence[Tensor],
    ) -> Predictions:
        """All layers of a host whose references stay fixed: the initial boxes come of the one that the settings say."""
        frame = delta(states[(self.config.initial_layer or 1) - 1])
        for hidden, of_layer in zip(states, logits, strict=True):
            self.layer(hidden, lambda _: frame, reference, eps, of_layer)
        return self.out

    def layer(
        self, hidden: Tensor, delta: Callable[[Tensor], Tensor], reference: Tensor, eps: float, logits: Tensor
    ) -> Tensor:
        """Refine by the next layer: from what its box head is fed, ``(B, Q, C)``, and its class logits; its box."""
        index = len(self.out.boxes)
        if index == 0:
            self.out.initial_boxes = self.locate(delta(hidden), reference, eps)
            self.out.initial_logits = logits
        cx, cy, w, h = self.out.initial_boxes.detach().unbind(-1)
        alone = self.config.distribution_losses_train == "head"
        self.z = self.add_residual(self.z, index, hidden)
        self.supervised = self.add_residual(self.supervised, index, hidden.detach()) if alone else self.z
        self.previous = hidden.detach()
        probability = torch.softmax(self.z, -1)
        offsets = sum(self.w_of_n[n] * probability[..., n] for n in range(len(self.w_of_n)))
        left, top, right, bottom = offsets.unbind(-1)
        x0, x1 = cx - w / 2 - left * w, cx + w / 2 + right * w
        y0, y1 = cy - h / 2 - top * h, cy + h / 2 + bottom * h
        sides = torch.stack([x1 - x0, y1 - y0], -1)
        held = torch.where(sides < 1e-5, 1e-5 + (sides - sides.detach()), sides)  # the value stops, the gradient not
        box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, *held.unbind(-1)], -1)
        if self.config.lqe:
            top4 = probability.sort(-1, descending=True).values[..., :4]
            shape = torch.cat([top4, top4.mean(-1, keepdim=True)], -1)
            logits = logits + self.fdr.quality[index](shape.reshape(*shape.shape[:2], -1))
        self.out.boxes.append(box)
        self.out.logits.append(logits)
        self.out.corner_logits.append(self.supervised)
        return box

    def add_residual(self, z: Tensor | float, index: int, hidden: Tensor) -> Tensor:
        residual = self.fdr.refine[index](hidden + self.previous)
        return z + self.config.residual_scale * residual.reshape(*hidden.shape[:2], 4, len(self.w_of_n))


class SlowScaledFDR(SlowFDR):
    """For hosts whose box heads move centres by sides of the reference, and scale its sides by exponentials."""

    def locate(self, moved: Tensor, reference: Tensor, eps: float) -> Tensor:
        x, y, w, h = reference.unbind(-1)
        dx, dy, dw, dh = moved.unbind(-1)
        return torch.stack([x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()], -1)


def xyxy(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: list[dict[str, Tensor]],
    costs: dict[str, float],
    phrases: Phrases = None,
    copies: int = 1,
) -> Pairs:
    """Hungarian matching image by image, focal class cost; the mean over a class's tokens where it has several.

    With copies of truths these get at most half of the queries; what one image cannot have, no later one has.
    """
    result: Pairs = []
    for image, target in enumerate(targets):
        p = logits[image].detach().sigmoid()
        focal_cost = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8) - 0.75 * p**2 * -torch.log(1 - p + 1e-8)
        class_cost = focal_cost[:, target["class_labels"]]
        if phrases is not None:
            of_classes = torch.stack([focal_cost[:, tokens].mean(-1) for tokens in phrases], -1)
            class_cost = of_classes[:, target["class_labels"]]
        l1 = (boxes[image].detach()[:, None] - target["boxes"][None]).abs().sum(-1)
        giou = generalized_box_iou(xyxy(boxes[image].detach()), xyxy(target["boxes"]))
        cost = costs["class"] * class_cost + costs["bbox"] * l1 - costs["giou"] * giou
        count = len(target["boxes"])
        if count and copies > 1:
            copies = min(len(cost) // (2 * count), copies)
        rows, columns = linear_sum_assignment(np.tile(cost.numpy(), (1, copies)))
        result.append([(int(q), int(t) % count) for q, t in zip(rows, columns, strict=True)])
    return result


def match_groups(
    logits: Tensor,
    boxes: Tensor,
    targets: list[dict[str, Tensor]],
    costs: dict[str, float],
    groups: int,
    phrases: Phrases = None,
    copies: int = 1,
) -> Pairs:
    """Each of so many groups of queries by itself."""
    size = logits.shape[1] // groups
    found: Pairs = [[] for _ in targets]
    for start in range(0, size * groups, size):
        own = slice(start, start + size)
        matched = match(logits[:, own], boxes[:, own], targets, costs, phrases, copies)
        for pairs, more in zip(found, matched, strict=True):
            pairs += [(query + start, truth) for query, truth in more]
    return found


def union(sets: list[Pairs]) -> Pairs:
    """Each query takes the truth that it met most often; the lowest of equals."""
    result: Pairs = []
    for image in range(len(sets[0])):
        counts = Counter(pair for pairs in sets for pair in pairs[image])
        best: dict[int, int] = {}
        for (query, truth), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0][1])):
            best.setdefault(query, truth)
        result.append(sorted(best.items()))
    return result


def each(pairs: Pairs) -> list[tuple[int, int, int]]:
    return [(image, q, t) for image, of_image in enumerate(pairs) for q, t in of_image]


def iou(box: Tensor, truth: Tensor) -> Tensor:
    return pairwise_iou(xyxy(box[None]), xyxy(truth[None]))[0, 0]


Weights = dict[tuple[int, int], float]
"""Of matched queries, by image and query."""


def box_terms(
    boxes: Tensor, targets: list[dict[str, Tensor]], pairs: Pairs, norm: float, weights: Weights | None = None
) -> dict[str, Tensor]:
    l1 = giou = boxes.sum() * 0
    for image, q, t in each(pairs):
        truth = targets[image]["boxes"][t]
        weight = weights[image, q] if weights else 1.0
        l1 = l1 + weight * (boxes[image, q] - truth).abs().sum()
        giou = giou + weight * (1 - generalized_box_iou(xyxy(boxes[image, q][None]), xyxy(truth[None]))[0, 0])
    return {"loss_bbox": l1 / norm, "loss_giou": giou / norm}


@dataclass
class Lesson:
    """A teacher's predictions, its bins, and its share in FGL's targets."""

    predictions: Predictions
    w_of_n: list[float]
    share: float

    def of(self, image: int, truth: Tensor) -> tuple[float, list[list[tuple[float, float]]]]:
        """Of the query whose box overlaps the truth most: the weight of its word, and for each edge the places that it
        may be at, with their probabilities."""
        overlaps = [float(iou(box, truth)) for box in self.predictions.boxes[-1][image]]
        best = overlaps.index(max(overlaps))
        frame = self.predictions.initial_boxes[image, best].detach()
        edges = []
        for edge, at in enumerate(xyxy(frame[None])[0].tolist()):
            p = torch.softmax(self.predictions.corner_logits[-1][image, best, edge].detach(), -1).tolist()
            step = float(frame[2 + edge % 2]) * (-1 if edge < 2 else 1)
            edges.append([(at + step * w, probability) for w, probability in zip(self.w_of_n, p, strict=True)])
        return self.share * overlaps[best], edges


def two_bins(log_p: Tensor, phi: float, w_of_n: list[float]) -> Tensor:
    """Cross entropy with an edge that is to move by so many sides of its box."""
    if phi <= w_of_n[0]:
        return -log_p[0]
    if phi >= w_of_n[-1]:
        return -log_p[-1]
    n = max(i for i in range(len(w_of_n) - 1) if w_of_n[i] <= phi)
    right = (phi - w_of_n[n]) / (w_of_n[n + 1] - w_of_n[n])
    return -((1 - right) * log_p[n] + right * log_p[n + 1])


def fgl(
    z: Tensor,
    boxes: Tensor,
    initial: Tensor,
    targets: list[dict[str, Tensor]],
    pairs: Pairs,
    norm: float,
    w_of_n: list[float],
    lesson: Lesson | None = None,
) -> Tensor:
    total = z.sum() * 0
    for image, q, t in each(pairs):
        truth = targets[image]["boxes"][t]
        weight = iou(boxes[image, q].detach(), truth)
        frame = initial[image, q].detach()
        share, places = lesson.of(image, truth) if lesson else (0.0, [[]] * 4)
        edges = zip(xyxy(frame[None])[0].tolist(), xyxy(truth[None])[0].tolist(), places, strict=True)
        for edge, (own, wanted, said) in enumerate(edges):
            log_p = F.log_softmax(z[image, q, edge], -1)
            side = float(frame[2 + edge % 2]) * (-1 if edge < 2 else 1)
            entropy = two_bins(log_p, (wanted - own) / side, w_of_n)
            taught = sum(p * two_bins(log_p, (place - own) / side, w_of_n) for place, p in said)
            total = total + weight * ((1 - share) * entropy + share * taught)
    return total / norm


def ddf(
    layer: int, predictions: Predictions, targets: list[dict[str, Tensor]], pairs: Pairs, temperature: float
) -> Tensor:
    student, teacher = predictions.corner_logits[layer], predictions.corner_logits[-1].detach()
    truth_of = {(image, q): t for image, q, t in each(pairs)}
    matched, unmatched = [], []
    for image in range(student.shape[0]):
        for q in range(student.shape[1]):
            if (image, q) in truth_of:
                truth = targets[image]["boxes"][truth_of[image, q]]
                quality, into = iou(predictions.boxes[layer][image, q].detach(), truth), matched
            else:
                quality, into = predictions.logits[-1][image, q].detach().sigmoid().max(), unmatched
            for edge in range(4):
                p = torch.softmax(teacher[image, q, edge] / temperature, -1)
                log_s = F.log_softmax(student[image, q, edge] / temperature, -1)
                into.append(quality * temperature**2 * (p * (p.log() - log_s)).sum())
    total, roots = student.sum() * 0, 0.0
    for terms in (matched, unmatched):
        if terms:
            total = total + torch.stack(terms).mean() * math.sqrt(len(terms))
            roots += math.sqrt(len(terms))
    return total / roots


def distribution_terms(
    names: list[str],
    part: Predictions,
    targets: list[dict[str, Tensor]],
    pairs_of: list[Pairs],
    norm: float,
    config: Any,
    lesson: Lesson | None = None,
) -> dict[str, Tensor]:
    """Every weighted FGL and DDF term of a group of queries, under the suffixes of its layers."""
    w_of_n = config.bin_values().double().tolist()
    losses = {}
    for i, suffix in enumerate(names):
        of_layer = part.corner_logits[i], part.boxes[i], part.initial_boxes
        term = fgl(*of_layer, targets, pairs_of[i], norm, w_of_n, lesson)
        losses["loss_fgl" + suffix] = config.fgl_weight * term
        if config.ddf and i < len(names) - 1:
            losses["loss_ddf" + suffix] = config.ddf_weight * ddf(i, part, targets, pairs_of[i], config.temperature)
    return losses


def vfl(logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], pairs: Pairs, norm: float) -> Tensor:
    """RT-DETR's varifocal loss: alpha 0.75, gamma 2."""
    score = torch.zeros_like(logits)
    for image, q, t in each(pairs):
        score[image, q, targets[image]["class_labels"][t]] = iou(boxes[image, q].detach(), targets[image]["boxes"][t])
    positive = torch.zeros_like(logits)
    for image, q, t in each(pairs):
        positive[image, q, targets[image]["class_labels"][t]] = 1
    weight = 0.75 * logits.detach().sigmoid() ** 2 * (1 - positive) + score
    return (weight * -(score * F.logsigmoid(logits) + (1 - score) * F.logsigmoid(-logits))).sum() / norm


def mal(logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], pairs: Pairs, norm: float) -> Tensor:
    """DEIM's matchability-aware loss, gamma 1.5, pair by pair over what all would be as background."""
    p = logits.sigmoid()
    loss = -(p.detach() ** 1.5 * (1 - p).log()).sum()
    for image, query, truth in each(pairs):
        found = p[image, query, targets[image]["class_labels"][truth]]
        wanted = iou(boxes[image, query].detach(), targets[image]["boxes"][truth]) ** 1.5
        loss = loss + found.detach() ** 1.5 * (1 - found).log()
        loss = loss - wanted * found.log() - (1 - wanted) * (1 - found).log()
    return loss / norm


def quality(p: Tensor, box: Tensor, truth: Tensor, eps: float = 0.0) -> Tensor:
    """LW-DETR's and Align-DETR's target ``max(p^0.25 IoU^0.75, 0.01)``; ``eps`` is what the host adds to the union."""
    overlap = iou(box, truth)
    area = (box[2:].prod() + truth[2:].prod()) / (1 + overlap)
    return (p**0.25 * (overlap * area / (area + eps)) ** 0.75).detach().clamp(min=0.01)


DETREX_EPS = 1e-6
"""What detrex adds to unions of boxes."""


def rank_weights(logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], pairs: Pairs, tau: float) -> Weights:
    """Align-DETR's weights ``exp(-rank / tau)``: a truth's queries ranked by quality, the best of rank 0,
    the first of equals."""
    rivals: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for image, q, t in each(pairs):
        p = logits[image, q, targets[image]["class_labels"][t]].sigmoid()
        rivals.setdefault((image, t), []).append(
            (float(quality(p, boxes[image, q], targets[image]["boxes"][t], DETREX_EPS)), q)
        )
    return {
        (image, q): math.exp(-rank / tau)
        for (image, _), queries in rivals.items()
        for rank, (_, q) in enumerate(sorted(queries, key=lambda entry: (-entry[0], entry[1])))
    }


def iou_aware(
    logits: Tensor,
    boxes: Tensor,
    targets: list[dict[str, Tensor]],
    pairs: Pairs,
    norm: float,
    weights: Weights | None = None,
    eps: float = 0.0,
) -> Tensor:
    """LW-DETR's cross entropy with qualities, weighted or not, for targets; the rest is background, weighted by p^2."""
    p = logits.sigmoid()
    loss = -(p**2 * (1 - p).log()).sum()
    for image, q, t in each(pairs):
        found = p[image, q, targets[image]["class_labels"][t]]
        target = quality(found, boxes[image, q], targets[image]["boxes"][t], eps)
        target = target * (weights[image, q] if weights else 1.0)
        loss = loss + found**2 * (1 - found).log() - target * found.log() - (1 - target) * (1 - found).log()
    return loss / norm


def focal(
    logits: Tensor, targets: list[dict[str, Tensor]], pairs: Pairs, norm: float, phrases: Phrases = None
) -> Tensor:
    """Deformable-DETR's focal loss: alpha 0.25, gamma 2. All tokens of a truth's class are positive."""
    positive = torch.zeros_like(logits)
    for image, q, t in each(pairs):
        label = int(targets[image]["class_labels"][t])
        positive[image, q, [label] if phrases is None else list(phrases[label])] = 1
    p = logits.sigmoid()
    loss = -(
        0.25 * positive * (1 - p) ** 2 * F.logsigmoid(logits) + 0.75 * (1 - positive) * p**2 * F.logsigmoid(-logits)
    )
    return loss.sum() / norm
