"""Where edges may lie, in pixels: against loops, and where two bins alone have an exact answer."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dfine_plugin.distributions import edge_distributions

from . import reference
from .drawing import LAW, bins, even_bins, random, random_boxes, scales, seeds

SIZE = (640, 480)


@LAW
@given(seeds, even_bins, scales)
def test_equals_the_loop(seed: int, num_bins: int, a: float) -> None:
    """Layers share their initial boxes; every number of every edge by itself."""
    boxes, weights = random_boxes(seed, 2), bins(num_bins, a=a)
    logits = random(seed, 3, 2, 4, num_bins + 1, scale=3)
    found = edge_distributions(boxes, logits, weights, SIZE)
    for layer in range(3):
        for query in range(2):
            box = [side * length for side, length in zip(boxes[query].tolist(), SIZE * 2, strict=True)]
            refined = reference.edges(reference.decode(box, logits[layer, query].tolist(), weights.tolist()))
            for edge in range(4):
                pr = reference.softmax(logits[layer, query, edge].tolist())
                moves = [w * box[2 + edge % 2] for w in weights.tolist()]
                mean = math.fsum(p * x for p, x in zip(pr, moves, strict=True))
                squares = math.fsum(p * x * x for p, x in zip(pr, moves, strict=True))
                at = layer, query, edge
                torch.testing.assert_close(found.probabilities[at].tolist(), pr)
                torch.testing.assert_close(found.offsets[query, edge].tolist(), moves)
                torch.testing.assert_close(found.means[at].item(), mean, atol=1e-9, rtol=1e-6)
                torch.testing.assert_close(found.deviations[at].item() ** 2, squares - mean**2, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(found.initial_edges[query, edge].item(), reference.edges(box)[edge])
                torch.testing.assert_close(found.edges[at].item(), refined[edge], atol=1e-6, rtol=1e-6)


@LAW
@given(st.floats(0.01, 0.99), st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda pair: pair[0] != pair[1]))
def test_two_bins_deviate_by_the_root_of_p_times_1_minus_p(p: float, pair: tuple[int, int]) -> None:
    """A coin between two offsets, on a box of 320 by 120 pixels: the left edge by its width, the top by its height."""
    weights, logits = bins(8), torch.full((4, 9), -torch.inf, dtype=torch.float64)
    logits[:, pair[0]], logits[:, pair[1]] = math.log(p), math.log1p(-p)
    box = torch.tensor([0.5, 0.5, 0.5, 0.25], dtype=torch.float64)
    apart = abs(float(weights[pair[0]] - weights[pair[1]])) * math.sqrt(p * (1 - p))
    expected = [320 * apart, 120 * apart] * 2
    torch.testing.assert_close(edge_distributions(box, logits, weights, SIZE).deviations.tolist(), expected)
