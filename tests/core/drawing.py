"""What the tests of the core draw: seeded tensors and hypothesis strategies."""

from __future__ import annotations

import os

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from . import reference
from .reference import Pairs

Indices = list[tuple[Tensor, Tensor]]

LAW = settings(max_examples=int(os.environ.get("DFINE_EXAMPLES", "40")))

seeds = st.integers(0, 2**31 - 1)
even_bins = st.integers(2, 32).map(lambda half: 2 * half)
scales = st.floats(0.05, 2.0)


def random(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers times the scale."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def uniform(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Float64 numbers between low and high."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def random_boxes(seed: int, *shape: int) -> Tensor:
    """Float64 (cx, cy, w, h) inside or near the image, sides from 0.1 to 0.5."""
    centres = uniform(seed, *shape, 2, low=0.25, high=0.75)
    return torch.cat([centres, uniform(seed + 1, *shape, 2, low=0.1, high=0.5)], dim=-1)


def bins(num_bins: int = 8, a: float = 0.5, c: float = 0.25) -> Tensor:
    """W in float64, from the slow formula."""
    return torch.tensor(reference.weighting(num_bins, a, c), dtype=torch.float64)


def to_indices(matching: list[Pairs]) -> Indices:
    """Pairs as two int64 tensors an image."""
    return [(torch.tensor([q for q, _ in x]).long(), torch.tensor([t for _, t in x]).long()) for x in matching]


def to_pairs(indices: Indices) -> list[Pairs]:
    """Two int64 tensors an image as pairs."""
    for queries, truths in indices:
        assert queries.dtype == truths.dtype == torch.int64
        assert queries.shape == truths.shape
    return [list(zip(queries.tolist(), truths.tolist(), strict=True)) for queries, truths in indices]
