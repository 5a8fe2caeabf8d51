"""LQE: the quality estimated from the peaks of the four distributions."""

from __future__ import annotations

import torch

from .drawing import random
from .test_head import BINS, IMAGES, LAYERS, QUERIES, make_head


def test_fresh_quality_is_zero_in_every_layer() -> None:
    """The last Linear starts at zero: (B, Q, 1) zeros, that still learn."""
    head = make_head(seed=None, lqe=True)
    for layer in range(LAYERS):
        quality = head.quality_logits(layer, random(layer, IMAGES, QUERIES, 4, BINS + 1).float().softmax(-1))
        assert quality.shape == (IMAGES, QUERIES, 1)
        assert not quality.any()
        assert quality.requires_grad


def test_quality_costs_nothing_when_it_is_off() -> None:
    """Without LQE the head has the refinement's parameters alone."""
    head = make_head(lqe=False)
    assert {id(p) for p in head.parameters()} == {id(p) for p in head.refine.parameters()}
    assert len(list(make_head(lqe=True).parameters())) > len(list(head.parameters()))


def test_quality_sees_the_four_largest_probabilities_alone() -> None:
    """Order of the bins and the split of the small rest do not matter; the four largest do."""
    head = make_head(lqe=True)
    probability = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01]).repeat(1, 1, 4, 1)
    expected = head.quality_logits(2, probability)
    assert expected.abs().max() > 0
    order = torch.randperm(BINS + 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.quality_logits(2, probability[..., order]), expected)
    even = probability.clone()
    even[..., 4:] = 0.15 / 5
    torch.testing.assert_close(head.quality_logits(2, even), expected)
    for rank in range(4):
        sharper = probability.clone()
        sharper[..., rank] += 0.04  # still below the next larger one, and taken from the small rest alone
        sharper[..., 4:] *= 0.11 / 0.15
        assert not torch.allclose(head.quality_logits(2, sharper), expected), rank
    assert not torch.allclose(head.quality_logits(1, probability), expected)


def test_quality_tells_the_edges_and_layers_apart() -> None:
    """The statistics keep the order of the edges, and every query is its own."""
    head, distributions = make_head(lqe=True), random(3, IMAGES, QUERIES, 4, BINS + 1).float().softmax(-1)
    expected = head.quality_logits(0, distributions)
    assert not torch.allclose(head.quality_logits(0, distributions[:, :, [2, 3, 0, 1]]), expected)
    torch.testing.assert_close(head.quality_logits(0, distributions[:, [2, 0, 1]]), expected[:, [2, 0, 1]])
