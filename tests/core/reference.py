"""The formulas of the method as slow loops over Python floats, written from the paper and sharing no code with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pairs = list[tuple[int, int]]


def weighting(num_bins: int, a: float, c: float) -> list[float]:
    """W(0) .. W(N), case by case."""
    ratio = a / c + 1
    values = []
    for n in range(num_bins + 1):
        if n == 0:
            values.append(-2 * a)
        elif n < num_bins / 2:
            values.append(c - c * ratio ** ((num_bins - 2 * n) / (num_bins - 2)))
        elif n < num_bins:
            values.append(-c + c * ratio ** ((2 * n - num_bins) / (num_bins - 2)))
        else:
            values.append(2 * a)
    return values


def published_weighting(num_bins: int, up: float, reg_scale: float) -> list[float]:
    """The authors' own way: powers of one step, in units of 1 / reg_scale of a side."""
    step = (up * reg_scale + 1) ** (2 / (num_bins - 2))
    positive = [step**i - 1 for i in range(1, num_bins // 2)]
    end = 2 * up * reg_scale
    return [-end, *(-value for value in reversed(positive)), 0.0, *positive, end]


def softmax(logits: Sequence[float]) -> list[float]:
    """Shifted by the largest logit."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [p / math.fsum(powers) for p in powers]


def edges(box: Sequence[float]) -> list[float]:
    """Left, top, right, bottom of (cx, cy, w, h)."""
    cx, cy, w, h = box
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def decode(
    box: Sequence[float], logits: Sequence[Sequence[float]], weights: Sequence[float], smallest: float = -math.inf
) -> list[float]:
    """One box moved edge by edge; sides below ``smallest`` become ``smallest``, about the same centre."""
    offsets = [math.fsum(w * p for w, p in zip(weights, softmax(row), strict=True)) for row in logits]
    left, top, right, bottom = edges(box)
    left, right = left - offsets[0] * box[2], right + offsets[2] * box[2]
    top, bottom = top - offsets[1] * box[3], bottom + offsets[3] * box[3]
    return [(left + right) / 2, (top + bottom) / 2, max(right - left, smallest), max(bottom - top, smallest)]


def offsets_to(box: Sequence[float], target: Sequence[float]) -> list[float]:
    """phi: how far each edge moves outwards, in sides of the box."""
    mine, true = edges(box), edges(target)
    _, _, w, h = box
    return [(mine[0] - true[0]) / w, (mine[1] - true[1]) / h, (true[2] - mine[2]) / w, (true[3] - mine[3]) / h]


def two_bins(phi: float, weights: Sequence[float]) -> tuple[int, float, float]:
    """The bin left of phi and the two weights, found by walking along W."""
    last = len(weights) - 1
    if phi <= weights[0]:
        return 0, 1.0, 0.0
    if phi >= weights[last]:
        return last - 1, 0.0, 1.0
    left = 0
    while weights[left + 1] <= phi:
        left += 1
    right_weight = (phi - weights[left]) / (weights[left + 1] - weights[left])
    return left, 1 - right_weight, right_weight


def fgl(logits: Tensor, boxes: Tensor, targets: Tensor, iou: Tensor, weights: Tensor, num_boxes: float) -> float:
    """IoU times the two-bin cross entropy, pair by pair and edge by edge."""
    terms = []
    for pair in range(len(logits)):
        for edge, phi in enumerate(offsets_to(boxes[pair].tolist(), targets[pair].tolist())):
            left, left_weight, right_weight = two_bins(phi, weights.tolist())
            probability = softmax(logits[pair, edge].tolist())
            entropy = -left_weight * math.log(probability[left]) - right_weight * math.log(probability[left + 1])
            terms.append(float(iou[pair]) * entropy)
    return math.fsum(terms) / max(num_boxes, 1)


def ddf(student: Tensor, teacher: Tensor, matched: Tensor, quality: Tensor, temperature: float) -> float:
    """T^2 KL(teacher || student) times the quality; the two groups' means, by the root of their sizes."""
    terms: dict[bool, list[float]] = {True: [], False: []}
    sizes = {True: 0, False: 0}
    for image in range(len(student)):
        for query in range(student.shape[1]):
            group = bool(matched[image, query])
            sizes[group] += 1
            for edge in range(4):
                p = softmax([x / temperature for x in teacher[image, query, edge].tolist()])
                q = softmax([x / temperature for x in student[image, query, edge].tolist()])
                divergence = math.fsum(pn * math.log(pn / qn) for pn, qn in zip(p, q, strict=True))
                terms[group].append(float(quality[image, query]) * temperature**2 * divergence)
    above = below = 0.0
    for group, size in sizes.items():
        if size:
            above += math.fsum(terms[group]) / len(terms[group]) * math.sqrt(size)
            below += math.sqrt(size)
    return above / below if below else 0.0


def union(sets: list[list[Pairs]]) -> list[Pairs]:
    """Votes counted image by image; each query takes its most frequent truth, the lowest one of equals."""
    result = []
    for image in range(len(sets[0])):
        votes = Counter(pair for prediction_set in sets for pair in prediction_set[image])
        chosen = []
        for query in sorted({query for query, _ in votes}):
            truths = {truth: count for (voter, truth), count in votes.items() if voter == query}
            most = max(truths.values())
            chosen.append((query, min(truth for truth, count in truths.items() if count == most)))
        result.append(chosen)
    return result


def numeric_gradient(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences, one entry at a time."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        moved = [at.clone(), at.clone()]
        moved[0].view(-1)[index] += step
        moved[1].view(-1)[index] -= step
        gradient.view(-1)[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


def mal(
    logits: Tensor, matched: Sequence[tuple[int, int, int]], iou: Sequence[float], num_boxes: float, gamma: float
) -> float:
    """Query by query and class by class, with the published case distinction."""
    quality = {index: value**gamma for index, value in zip(matched, iou, strict=True)}
    total = 0.0
    for image in range(logits.shape[0]):
        for query in range(logits.shape[1]):
            for label in range(logits.shape[2]):
                logit = float(logits[image, query, label])
                # 1 - p by itself: of a logit of 30, subtraction leaves three digits of it
                p, rest = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
                if (image, query, label) in quality:
                    q = quality[image, query, label]
                    total -= q * math.log(p) + (1 - q) * math.log(rest)
                else:
                    total -= p**gamma * math.log(rest)
    return total / num_boxes
