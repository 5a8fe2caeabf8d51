"""FGL and DDF, the two losses on the edges' distributions, and MAL for the classes beside them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import at_least_float32, encode_boxes

MAL_GAMMA = 1.5
"""The exponent of the matchability-aware loss, as its authors have it."""

TINY = 1e-6
"""Stands in for the root of a count of zero, whose part of the loss is zero, too."""


def fgl_loss(
    logits: Tensor,
    initial_boxes: Tensor,
    target_boxes: Tensor,
    iou: Tensor,
    weights: Tensor,
    num_boxes: float | Tensor,
) -> Tensor:
    """Fine-Grained Localization loss (D-FINE, eq. 3): two-bin cross entropy of each edge, weighted by IoU.

    ``sum over pairs and edges of IoU * (left_weight CE(left_bin) + right_weight CE(left_bin + 1)) / num_boxes``, with
    the bins and weights of :func:`encode_boxes`.

    Args:
        logits: ``(M, 4, K)``, the matched queries' distributions.
        initial_boxes: ``(M, 4)`` cxcywh, the frame of the distributions.
        target_boxes: ``(M, 4)`` cxcywh.
        iou: ``(M,)``, IoU of the predicted box with its truth; no gradient flows into it.
        weights: ``(K,)``, the bins' offsets in initial-box sides.
        num_boxes: the normaliser, held at 1 or above.

    Returns:
        A scalar, float32 or float64; 0 (with a gradient of zeros) where M is 0.
    """
    targets = encode_boxes(initial_boxes, target_boxes, weights)
    return fgl_of_bins(logits, *targets, iou, num_boxes)


def fgl_of_bins(
    logits: Tensor, left_bin: Tensor, left_weight: Tensor, right_weight: Tensor, iou: Tensor, num_boxes: float | Tensor
) -> Tensor:
    """:func:`fgl_loss` for targets that are encoded already, of one layer or of several with the same targets.

    Args:
        logits: ``(..., M, 4, K)``.
        left_bin, left_weight, right_weight: ``(M, 4)``.
        iou: ``(..., M)``.
        num_boxes: the normaliser.

    Returns:
        ``(...)``.
    """
    logits = at_least_float32(logits)
    bins = torch.stack([left_bin, left_bin + 1], dim=-1).expand(*logits.shape[:-1], 2)
    log_probabilities = logits.gather(-1, bins) - logits.logsumexp(-1, keepdim=True)
    cross_entropy = -(torch.stack([left_weight, right_weight], dim=-1) * log_probabilities).sum(-1)
    return _over_boxes(cross_entropy, iou, num_boxes)


def fgl_of_distributions(logits: Tensor, targets: Tensor, iou: Tensor, num_boxes: float | Tensor) -> Tensor:
    """:func:`fgl_of_bins` with a whole distribution for each edge's target: cross entropy, weighted by IoU.

    Args:
        logits: ``(..., M, 4, K)``.
        targets: ``(M, 4, K)``, of no gradient.
        iou: ``(..., M)``.
        num_boxes: the normaliser.

    Returns:
        ``(...)``.
    """
    cross_entropy = -(targets * F.log_softmax(at_least_float32(logits), dim=-1)).sum(-1)
    return _over_boxes(cross_entropy, iou, num_boxes)


def _over_boxes(of_edges: Tensor, iou: Tensor, num_boxes: float | Tensor) -> Tensor:
    """The sum over pairs and edges ``(..., M, 4)``, each pair with its IoU, over the number of boxes, at least 1."""
    loss = (of_edges.sum(-1) * iou.detach()).sum(-1)
    return loss / (num_boxes.clamp(min=1) if isinstance(num_boxes, Tensor) else max(num_boxes, 1))


def ddf_loss(
    student: Tensor,
    teacher: Tensor,
    matched: Tensor,
    quality: Tensor,
    temperature: float = 5.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Decoupled Distillation Focal loss (D-FINE, eq. 6): the last layer's distributions teach an earlier layer.

    Per query and edge ``quality * T^2 KL(softmax(teacher / T) || softmax(student / T))``; then the means over the K_m
    matched and over the K_u unmatched edges, weighted by their square roots::

        (mean_matched sqrt(K_m) + mean_unmatched sqrt(K_u)) / (sqrt(K_m) + sqrt(K_u))

    The paper's formula has sums where the authors' code, which gave the published results, takes these means.

    Args:
        student: ``(B, Q, 4, K)`` logits of the layer that learns.
        teacher: ``(B, Q, 4, K)`` logits of the last layer; no gradient flows into it.
        matched: ``(B, Q)`` bool.
        quality: ``(B, Q)``: IoU with the truth where matched, the teacher's highest class confidence elsewhere.
        temperature: T.
        counts: ``(2,)``, how many queries are matched and how many are not; by default those of this batch. With the
            averages over the processes of a distributed run, the mean of their losses is that of the whole batch.

    Returns:
        A scalar, float32 or float64.
    """
    return ddf_of_targets(student, *soft_targets(teacher, temperature), matched, quality, temperature, counts)


@torch.no_grad()
def soft_targets(teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``(..., K)`` logits to ``softmax(teacher / T)`` and its ``sum p log p``: the same for all layers that learn."""
    log_probabilities = F.log_softmax(at_least_float32(teacher) / temperature, dim=-1)
    probabilities = log_probabilities.exp()
    return probabilities, (probabilities * log_probabilities).sum(-1)


def ddf_of_targets(
    student: Tensor,
    probabilities: Tensor,
    negative_entropy: Tensor,
    matched: Tensor,
    quality: Tensor,
    temperature: float,
    counts: Tensor | None = None,
) -> Tensor:
    """:func:`ddf_loss` for :func:`soft_targets`."""
    scaled = at_least_float32(student) / temperature
    # KL(p || q) = sum p log p - sum p log q, and log q = scaled - logsumexp(scaled)
    divergence = negative_entropy - (probabilities * scaled).sum(-1) + scaled.logsumexp(-1)
    per_query = divergence.mean(-1) * quality.detach().to(divergence.dtype) * temperature**2
    # Counting queries instead of edges changes no mean, and cancels in the square roots. The mean of a part times the
    # root of its count is its sum over that root, which is a zero where the part is empty.
    if counts is None:
        counts = query_counts(matched)
    roots = counts.to(per_query.dtype).sqrt()
    sums = torch.stack([(per_query * matched).sum(), (per_query * ~matched).sum()])
    return (sums / roots.clamp(min=TINY)).sum() / roots.sum().clamp(min=TINY)


def query_counts(matched: Tensor) -> Tensor:
    """``(2,)``: how many queries of a mask are matched, and how many are not."""
    count = matched.sum()
    return torch.stack([count, matched.numel() - count])


def matchability_aware_loss(
    logits: Tensor,
    matched: tuple[Tensor, Tensor, Tensor],
    iou: Tensor,
    num_boxes: float | Tensor,
    gamma: float = MAL_GAMMA,
) -> Tensor:
    """Matchability-aware loss (MAL; DEIM, arXiv 2412.04234): confidence is to tell the IoU of the box with its truth.

    Of all queries and classes, with ``p = sigmoid(logit)``, the sum of ``-p^gamma log(1 - p)``, but of matched ones
    ``-(q log(p) + (1 - q) log(1 - p))`` with ``q = IoU^gamma``; over ``num_boxes``. No gradient flows through IoU or
    the weight ``p^gamma``.

    Args:
        logits: ``(B, Q, classes)``.
        matched: the images, queries and classes of the pairs, ``(M,)`` each.
        iou: ``(M,)``, of the predicted boxes with their truths.
        num_boxes: the normaliser.

    Returns:
        A scalar, float32 or float64.
    """
    logits = at_least_float32(logits)
    weight = logits.detach().sigmoid().pow(gamma)
    weight.index_put_(matched, weight.new_ones(()))
    # cross entropy with a score s is softplus(logit) - s logit, and s is zero but for the pairs
    wanted = iou.detach().to(logits.dtype).pow(gamma)
    return ((weight * F.softplus(logits)).sum() - (wanted * logits[matched]).sum()) / num_boxes
