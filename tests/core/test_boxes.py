"""Distributions to boxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin import decode_boxes

from . import reference
from .drawing import LAW, bins, even_bins, random, random_boxes, scales, seeds

SMALLEST = 1e-5


def slow_decode(boxes: Tensor, logits: Tensor, weights: Tensor, smallest: float = -math.inf) -> Tensor:
    """The reference over any leading shape."""
    flat = [
        reference.decode(box, rows, weights.tolist(), smallest)
        for box, rows in zip(boxes.reshape(-1, 4).tolist(), logits.reshape(-1, 4, len(weights)).tolist(), strict=True)
    ]
    return torch.tensor(flat, dtype=torch.float64).reshape(boxes.shape)


def one_hot_logits(bin_of_edge: list[int], num_bins: int = 8) -> Tensor:
    """All of an edge's weight on one bin."""
    logits = torch.full((4, num_bins + 1), -1e4, dtype=torch.float64)
    logits[torch.arange(4), torch.tensor(bin_of_edge)] = 0.0
    return logits


@LAW
@given(seeds, even_bins, scales, scales, st.floats(0.1, 5.0))
def test_decode_values(seed: int, num_bins: int, a: float, c: float, scale: float) -> None:
    """Every number is the slow loop's, clamped sides included."""
    boxes, logits, weights = random_boxes(seed, 3), random(seed, 3, 4, num_bins + 1, scale=scale), bins(num_bins, a, c)
    actual = decode_boxes(boxes, logits, weights)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, slow_decode(boxes, logits, weights, SMALLEST), rtol=1e-9, atol=1e-9)


def test_decode_gradient() -> None:
    """Analytic, numeric and slow gradients agree, for the boxes and the logits."""
    boxes, logits, weights = random_boxes(0, 2), random(1, 2, 4, 9), bins()
    probe = random(2, 2, 4)
    free_boxes, free_logits = boxes.clone().requires_grad_(), logits.clone().requires_grad_()
    (decode_boxes(free_boxes, free_logits, weights) * probe).sum().backward()
    by_logits = reference.numeric_gradient(lambda x: float((slow_decode(boxes, x, weights) * probe).sum()), logits)
    by_boxes = reference.numeric_gradient(lambda x: float((slow_decode(x, logits, weights) * probe).sum()), boxes)
    torch.testing.assert_close(free_logits.grad, by_logits, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(free_boxes.grad, by_boxes, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(lambda b, z: decode_boxes(b, z, weights), (free_boxes, free_logits))


@LAW
@given(seeds, even_bins, scales, scales, st.floats(-3, 3))
def test_uniform_distribution_keeps_the_box(seed: int, num_bins: int, a: float, c: float, level: float) -> None:
    """Equal logits, and any distribution even about the middle, decode to the initial box."""
    boxes, weights = random_boxes(seed, 3), bins(num_bins, a, c)
    flat = torch.full((3, 4, num_bins + 1), level, dtype=torch.float64)
    torch.testing.assert_close(decode_boxes(boxes, flat, weights), boxes, rtol=0, atol=1e-12)
    logits = random(seed, 3, 4, num_bins + 1)
    torch.testing.assert_close(decode_boxes(boxes, logits + logits.flip(-1), weights), boxes, rtol=0, atol=1e-12)


@LAW
@given(seeds)
def test_decode_mirrors(seed: int) -> None:
    """Left and right swapped in a mirrored image give the mirrored box; so do top and bottom."""
    boxes, logits, weights = random_boxes(seed, 3), random(seed, 3, 4, 9), bins()
    mirrored_boxes = boxes.clone()
    mirrored_boxes[:, :2] = 1 - boxes[:, :2]
    expected = decode_boxes(boxes, logits, weights)
    expected[:, :2] = 1 - expected[:, :2]
    actual = decode_boxes(mirrored_boxes, logits[:, [2, 3, 0, 1]], weights)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("edge", "moved"),
    [
        (0, [0.4, 0.5, 0.4, 0.4]),
        (1, [0.5, 0.3, 0.2, 0.8]),
        (2, [0.6, 0.5, 0.4, 0.4]),
        (3, [0.5, 0.7, 0.2, 0.8]),
    ],
)
def test_positive_offset_grows_its_edge(edge: int, moved: list[float]) -> None:
    """One edge on the last bin, W = 1: it goes outwards by a whole side, the other three stay."""
    box = torch.tensor([0.5, 0.5, 0.2, 0.4], dtype=torch.float64)
    on_bin = [4, 4, 4, 4]
    on_bin[edge] = 8
    actual = decode_boxes(box, one_hot_logits(on_bin), bins())
    torch.testing.assert_close(actual, torch.tensor(moved, dtype=torch.float64))


def test_negative_sides_are_clamped_with_a_gradient() -> None:
    """Both edges a side inwards: the smallest side, the same centre, and the unclamped gradient."""
    boxes, weights = random_boxes(3, 2), bins()
    logits = random(4, 2, 4, 9, scale=0.3)
    logits[..., 0] += 6.0
    probe = random(5, 2, 4)
    free = logits.clone().requires_grad_()
    actual = decode_boxes(boxes, free, weights)
    torch.testing.assert_close(actual[:, 2:], torch.full((2, 2), SMALLEST, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[:, :2], slow_decode(boxes, logits, weights)[:, :2])
    (actual * probe).sum().backward()
    expected = reference.numeric_gradient(lambda x: float((slow_decode(boxes, x, weights) * probe).sum()), logits)
    torch.testing.assert_close(free.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (3, 0), (2, 2, 3)])
def test_decode_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    """(..., 4) and (..., 4, K) give (..., 4)."""
    boxes, logits = random_boxes(6, *shape), random(7, *shape, 4, 9)
    actual = decode_boxes(boxes, logits, bins())
    assert actual.shape == (*shape, 4)
    torch.testing.assert_close(actual, slow_decode(boxes, logits, bins(), SMALLEST), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_computes_halves_in_float32(dtype: torch.dtype) -> None:
    """Half-precision inputs give what their float32 copies give."""
    boxes, logits, weights = random_boxes(8, 6).to(dtype), random(9, 6, 4, 9).to(dtype), bins().float()
    actual = decode_boxes(boxes, logits, weights)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, decode_boxes(boxes.float(), logits.float(), weights), rtol=0, atol=1e-7)


def test_decode_under_autocast_stays_float32() -> None:
    """A bfloat16 autocast changes no bit."""
    boxes, logits, weights = random_boxes(10, 6).float(), random(11, 6, 4, 9).float(), bins().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = decode_boxes(boxes, logits, weights)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, decode_boxes(boxes, logits, weights))
