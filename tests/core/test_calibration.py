"""What calibration teaches an edge: a Laplace distribution over the bins, against one summed up bin by bin."""

from __future__ import annotations

import math

import pytest
import torch

from dfine_plugin import FDRConfig, decode_boxes
from dfine_plugin.calibration import SPREAD, spread_edges


@pytest.mark.parametrize(
    "config", [FDRConfig(), FDRConfig(num_bins=16, a=1.0), FDRConfig(weighting="uniform")], ids=str
)
def test_every_bin_has_the_laplace_mass_of_the_offsets_that_it_answers_for(config: FDRConfig) -> None:
    w = config.bin_values().tolist()
    initial = torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    # by how many sides the edges move: left, top, right, bottom
    left, top, right, bottom = moves = (0.08, -0.21, 0.0, 0.37)
    x0, y0, x1, y1 = 0.4 - 0.2 * left, 0.35 - 0.1 * top, 0.6 + 0.2 * right, 0.45 + 0.1 * bottom
    boxes = torch.tensor([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]])
    found = spread_edges(initial, boxes, config.bin_values())[0]
    for edge, offset in enumerate(moves):
        mass = []
        for n, value in enumerate(w):
            low = (w[n - 1] + value) / 2 if n > 0 else value
            high = (w[n + 1] + value) / 2 if n + 1 < len(w) else value
            mass.append(math.exp(-abs(value - offset) / SPREAD) * (high - low))
        expected = torch.tensor([m / sum(mass) for m in mass])
        torch.testing.assert_close(found[edge], expected, rtol=1e-4, atol=1e-6)


def test_the_distributions_decode_to_the_boxes_and_are_as_wide_as_said() -> None:
    weights = FDRConfig().bin_values()
    generator = torch.Generator().manual_seed(0)
    initial = torch.rand(200, 4, generator=generator) * 0.3 + 0.2
    moved = initial * (1 + 0.2 * (torch.rand(200, 4, generator=generator) - 0.5))
    probabilities = spread_edges(initial, moved, weights)
    decoded = decode_boxes(initial, probabilities.clamp(min=1e-30).log(), weights)
    assert (decoded - moved).abs().max() < 0.01
    mean = (probabilities * weights).sum(-1, keepdim=True)
    deviation = (probabilities * (weights - mean).abs()).sum(-1)
    assert deviation.mean() == pytest.approx(SPREAD, rel=0.2)


def test_beyond_the_bins_the_last_one_is_the_likeliest() -> None:
    weights = FDRConfig().bin_values()
    initial = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    probabilities = spread_edges(initial, torch.tensor([[0.5, 0.5, 0.9, 0.9]]), weights)
    assert (probabilities.argmax(-1) >= len(weights) - 2).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 4))
