"""The matchability-aware loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin.losses import MAL_GAMMA, matchability_aware_loss

from . import reference
from .drawing import LAW, random, seeds, uniform

Matched = tuple[Tensor, Tensor, Tensor]


def pairs(seed: int, count: int) -> tuple[Matched, Tensor]:
    """Images, queries and classes of so many of 2 x 5 queries, each once, and their boxes' IoUs."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(10, generator=generator)[:count]
    return (places // 5, places % 5, torch.randint(3, (count,), generator=generator)), uniform(seed, count)


@LAW
@given(seeds, st.integers(0, 10), st.floats(0.5, 3.0), st.floats(1.0, 40.0), st.floats(0.1, 8.0))
def test_mal_values(seed: int, count: int, gamma: float, num_boxes: float, scale: float) -> None:
    """The slow loop's number for any pairs, exponent and normaliser."""
    (matched, iou), logits = pairs(seed, count), random(seed + 1, 2, 5, 3, scale=scale)
    actual = matchability_aware_loss(logits, matched, iou, num_boxes, gamma)
    assert actual.shape == ()
    assert actual.dtype == torch.float64
    places = list(zip(*(index.tolist() for index in matched), strict=True))
    wanted = reference.mal(logits, places, iou.tolist(), num_boxes, gamma)
    assert actual.item() == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_mal_gradient() -> None:
    """The closed form: sigmoid minus quality for pairs, p^gamma times sigmoid elsewhere, for the weight has none."""
    (matched, iou), logits = pairs(1, 4), random(2, 2, 5, 3).requires_grad_()
    matchability_aware_loss(logits, matched, iou.requires_grad_(), 4.0).backward()
    p = logits.detach().sigmoid()
    closed = p**MAL_GAMMA * p
    closed[matched] = p[matched] - iou.detach() ** 1.5
    torch.testing.assert_close(logits.grad, closed / 4)
    assert iou.grad is None


def test_it_is_least_where_confidence_is_the_quality() -> None:
    """Of a pair alone, whatever its IoU: half of IoU^gamma or twice its odds cost more."""
    matched = tuple(torch.zeros(1, dtype=torch.long) for _ in range(3))
    for quality in (0.1, 0.5, 0.9):
        iou = torch.tensor([quality ** (1 / MAL_GAMMA)])
        best = torch.tensor(quality).logit()
        at, below, above = (
            matchability_aware_loss((best + shift).view(1, 1, 1), matched, iou, 1.0) for shift in (0, -0.7, 0.7)
        )
        assert at < below
        assert at < above


def test_in_half_precision_it_is_float32() -> None:
    (matched, iou), logits = pairs(3, 4), random(4, 2, 5, 3).half()
    loss = matchability_aware_loss(logits, matched, iou.half(), 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, matchability_aware_loss(logits.float(), matched, iou.half().float(), 4.0))
