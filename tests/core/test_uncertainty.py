"""Deviations of edges against sums in double precision; conformal intervals against the coverage that they promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from dfine_plugin import ConformalScale, edge_deviations
from dfine_plugin.distributions import edge_distributions
from dfine_plugin.record import FDRRecord
from dfine_plugin.uncertainty import conformal_quantile

from . import reference
from .drawing import LAW, bins, even_bins, random, random_boxes, scales, seeds


@LAW
@given(seeds, even_bins, scales)
def test_equals_the_sums(seed: int, num_bins: int, a: float) -> None:
    boxes, weights = random_boxes(seed, 2), bins(num_bins, a=a)
    logits = random(seed, 3, 2, 4, num_bins + 1, scale=3)
    found = edge_deviations(logits, weights, boxes)
    assert found.shape == (3, 2, 4)
    for layer, query, edge in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).tolist():
        pr = reference.softmax(logits[layer, query, edge].tolist())
        mean = math.fsum(p * w for p, w in zip(pr, weights.tolist(), strict=True))
        squares = math.fsum(p * w * w for p, w in zip(pr, weights.tolist(), strict=True))
        side = float(boxes[query, 2 + edge % 2])
        torch.testing.assert_close(found[layer, query, edge].item(), side * math.sqrt(squares - mean**2))


def test_it_is_precise_in_float32_however_sure_the_head() -> None:
    """A coin that falls on the other side once in 1e3 to 1e10 throws; W's end bins, where squares cancel most."""
    weights, boxes = bins(32), torch.tensor([0.5, 0.5, 0.2, 0.3], dtype=torch.float64)
    for odds in (1e3, 1e5, 1e7, 1e10):
        logits = torch.full((4, 33), -torch.inf, dtype=torch.float64)
        logits[:, 0], logits[:, 1] = math.log(odds), 0
        apart = float(weights[1] - weights[0]) * math.sqrt(odds) / (1 + odds)
        expected = torch.tensor([0.2, 0.3, 0.2, 0.3]) * apart
        found = edge_deviations(logits.float(), weights.float(), boxes.float())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_gradient_is_that_of_finite_differences_and_finite() -> None:
    weights, boxes = bins(8), random_boxes(0, 3).requires_grad_()
    logits = random(1, 3, 4, 9, scale=2).requires_grad_()
    assert torch.autograd.gradcheck(edge_deviations, (logits, weights, boxes))
    for dtype in (torch.float32, torch.float64):
        sure = torch.zeros(4, 9, dtype=dtype)
        sure[:, 2] = 1000
        sure.requires_grad_()
        found = edge_deviations(sure, weights, boxes[0].detach())
        found.sum().backward()
        assert found.max() < 1e-15
        assert sure.grad is not None
        assert sure.grad.isfinite().all()


def test_arithmetic_is_float32_or_better() -> None:
    logits, weights, boxes = random(0, 4, 9), bins(8), random_boxes(0)
    assert edge_deviations(logits, weights, boxes).dtype == torch.float64
    half = logits.half()
    found = edge_deviations(half, weights, boxes.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, edge_deviations(half.float(), weights.float(), boxes.float()))


def test_the_record_gives_them_in_image_sides_and_the_distributions_in_pixels() -> None:
    boxes, weights = random_boxes(3, 2, 5).float(), bins(8).float()
    layers = [random(seed, 2, 5, 4, 9).float() for seed in range(3)]
    record = FDRRecord(weights, boxes.requires_grad_(), layers)
    for layer in (0, 2):
        pixels = edge_distributions(boxes, layers[layer], weights, (640, 480)).deviations
        scaled = record.edge_deviations(layer) * torch.tensor([640, 480, 640, 480])
        torch.testing.assert_close(scaled, pixels)
    assert torch.equal(record.edge_deviations(), record.edge_deviations(2))
    assert not record.edge_deviations().requires_grad


@pytest.mark.parametrize(("count", "coverage"), [(9, 0.9), (19, 0.9), (30, 0.5), (40, 0.95)])
def test_coverage_over_many_fits_is_the_stated_one(count: int, coverage: float) -> None:
    """Errors are normal with deviations of any size, which the model misjudges threefold: a new edge is covered with
    probability erf(3 f / sqrt 2) for the factor f found, whose mean is the share of ranks, k / (n + 1)."""
    fits = 1500
    deviations = random(1, fits, count, 4).exp()
    errors = 3 * deviations * random(2, fits, count, 4)
    scales = [ConformalScale.fit(e, d, coverage) for e, d in zip(errors, deviations, strict=True)]
    edges = torch.erf(torch.tensor([scale.edges for scale in scales], dtype=torch.float64) / 3 / math.sqrt(2))
    boxes = torch.erf(torch.tensor([scale.box for scale in scales], dtype=torch.float64) / 3 / math.sqrt(2)) ** 4
    for covered in (*edges.unbind(1), boxes):
        mean, uncertain = float(covered.mean()), 4 * float(covered.std()) / math.sqrt(fits)
        assert coverage - uncertain <= mean <= coverage + 1 / (count + 1) + uncertain


def test_intervals_hold_the_share_that_the_rank_says() -> None:
    """Of the very detections that it was fitted on: ceil((n + 1) coverage) of n."""
    deviations, errors = random(0, 50, 4).exp(), random(1, 50, 4)
    truth = random(2, 50, 4)
    scale = ConformalScale.fit(errors, deviations, 0.8)
    low, high = scale.intervals(truth + errors, deviations)
    held = (low <= truth + 1e-12) & (truth <= high + 1e-12)
    assert held.sum(0).tolist() == [41] * 4
    low, high = scale.intervals(truth + errors, deviations, whole_box=True)
    assert int(((low <= truth + 1e-12) & (truth <= high + 1e-12)).all(-1).sum()) == 41
    torch.testing.assert_close((high - low) / 2, scale.half_widths(deviations, whole_box=True))


@pytest.mark.parametrize(("coverage", "least"), [(0.9, 9), (0.5, 1), (0.8, 4), (0.95, 19), (0.99, 99), (0.55, 2)])
def test_too_few_detections_for_the_coverage_are_refused(coverage: float, least: int) -> None:
    assert conformal_quantile(torch.arange(float(least)), coverage) == least - 1
    with pytest.raises(ValueError, match=f"takes at least {least} scores to fit, got {least - 1}"):
        conformal_quantile(torch.arange(least - 1.0), coverage)


@pytest.mark.parametrize(
    ("errors", "deviations", "coverage", "text"),
    [
        (torch.ones(20, 4), torch.ones(20, 4), 1.0, "coverage is a share between 0 and 1, got 1.0"),
        (torch.ones(20, 4), torch.ones(20), 0.9, r"\(n, 4\) each, got \(20, 4\) and \(20,\)"),
        (torch.ones(20, 4), torch.zeros(20, 4), 0.9, "deviations finite and above 0"),
        (torch.full((20, 4), torch.nan), torch.ones(20, 4), 0.9, "errors have to be finite"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    errors: torch.Tensor, deviations: torch.Tensor, coverage: float, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        ConformalScale.fit(errors, deviations, coverage)
