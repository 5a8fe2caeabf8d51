"""Boxes to the two bins and their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin import decode_boxes, encode_boxes

from . import reference
from .drawing import LAW, bins, even_bins, random_boxes, scales, seeds


def box_with_offsets(boxes: Tensor, phi: Tensor) -> Tensor:
    """The boxes whose edges lie phi sides outside those of the given ones."""
    centre, size = boxes.split(2, dim=-1)
    low, high = centre - size / 2 - phi[..., :2] * size, centre + size / 2 + phi[..., 2:] * size
    return torch.cat([(low + high) / 2, high - low], dim=-1)


@LAW
@given(seeds, even_bins, scales, scales)
def test_encode_values(seed: int, num_bins: int, a: float, c: float) -> None:
    """Bins and weights are the slow loop's; numpy's search finds the same bins."""
    boxes, targets, weights = random_boxes(seed, 6), random_boxes(seed + 7, 6), bins(num_bins, a, c)
    left_bin, left_weight, right_weight = encode_boxes(boxes, targets, weights)
    phi = [reference.offsets_to(box, target) for box, target in zip(boxes.tolist(), targets.tolist(), strict=True)]
    expected = torch.tensor([[reference.two_bins(x, weights.tolist()) for x in row] for row in phi]).double()
    assert left_bin.dtype == torch.int64
    assert left_bin.tolist() == expected[..., 0].long().tolist()
    torch.testing.assert_close(left_weight, expected[..., 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(right_weight, expected[..., 2], rtol=0, atol=1e-6)
    found = (np.searchsorted(weights.numpy(), np.array(phi), side="right") - 1).clip(0, num_bins - 1)
    assert left_bin.tolist() == found.tolist()


@LAW
@given(seeds, even_bins, scales, scales)
def test_round_trip(seed: int, num_bins: int, a: float, c: float) -> None:
    """The two weights as a distribution decode to the truth, wherever W reaches it."""
    boxes, weights = random_boxes(seed, 5), bins(num_bins, a, c)
    generator = torch.Generator().manual_seed(seed)
    low = max(-0.45, -2 * a)
    phi = low + (2 * a - low) * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    targets = box_with_offsets(boxes, phi)
    left_bin, left_weight, right_weight = encode_boxes(boxes, targets, weights)
    distribution = torch.zeros(5, 4, num_bins + 1, dtype=torch.float64)
    distribution.scatter_(-1, left_bin[..., None], left_weight[..., None])
    distribution.scatter_(-1, left_bin[..., None] + 1, right_weight[..., None])
    actual = decode_boxes(boxes, distribution.clamp_min(1e-30).log(), weights)
    torch.testing.assert_close(actual, targets, rtol=1e-9, atol=1e-9)


@LAW
@given(seeds, even_bins, scales, scales, st.sampled_from([torch.float32, torch.float64]))
def test_weights_sum_to_one(seed: int, num_bins: int, a: float, c: float, dtype: torch.dtype) -> None:
    """Two weights between 0 and 1 that sum to 1, a left bin that has a right neighbour."""
    boxes, targets = random_boxes(seed, 8).to(dtype), random_boxes(seed + 7, 8).to(dtype)
    left_bin, left_weight, right_weight = encode_boxes(boxes, targets, bins(num_bins, a, c).to(dtype))
    assert left_weight.dtype == right_weight.dtype == dtype
    assert bool((left_weight >= 0).all())
    assert bool((right_weight >= 0).all())
    torch.testing.assert_close(left_weight + right_weight, torch.ones(8, 4, dtype=dtype), rtol=0, atol=1e-6)
    assert int(left_bin.min()) >= 0
    assert int(left_bin.max()) <= num_bins - 1


@pytest.mark.parametrize(
    ("target", "left_bin", "left_weight"),
    [
        ([1.5, 0.5, 1.0, 1.0], [0, None, 7, None], [1.0, None, 0.0, None]),  # phi exactly W(0) and W(N)
        ([9.5, 0.5, 1.0, 1.0], [0, None, 7, None], [1.0, None, 0.0, None]),
        ([0.5, -8.5, 1.0, 1.0], [None, 7, None, 0], [None, 0.0, None, 1.0]),
        ([0.5, 0.5, 50.0, 50.0], [7, 7, 7, 7], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_outside_the_range(target: list[float], left_bin: list[int | None], left_weight: list[float | None]) -> None:
    """phi at or outside the ends puts all weight on the end bin, exactly."""
    unit = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    bin_of_edge, left, right = (x[0].tolist() for x in encode_boxes(unit, torch.tensor([target]), bins().float()))
    for edge in range(4):
        if left_bin[edge] is not None:
            assert (bin_of_edge[edge], left[edge], right[edge]) == (
                left_bin[edge],
                left_weight[edge],
                1 - left_weight[edge],
            )


def test_target_on_the_initial_box_is_the_middle_bin() -> None:
    """phi = 0 = W(N/2): all weight on the middle bin, from whichever side."""
    box = torch.tensor([[0.5, 0.5, 0.25, 0.5]])
    left_bin, left_weight, right_weight = encode_boxes(box, box, bins().float())
    middle = torch.where(left_bin == 4, left_weight, torch.where(left_bin == 3, right_weight, torch.zeros(1)))
    torch.testing.assert_close(middle, torch.ones(1, 4))


@pytest.mark.parametrize("sides", [(0.0, 0.2), (0.2, 0.0), (0.0, 0.0), (1e-30, 1e-30)])
def test_boxes_of_no_size_stay_finite(sides: tuple[float, float]) -> None:
    """An initial box without area still has two finite weights that sum to 1, truth elsewhere or on it."""
    box = torch.tensor([[0.5, 0.5, *sides]]).expand(2, 4)
    target = torch.tensor([[0.4, 0.6, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]])
    left_bin, left_weight, right_weight = encode_boxes(box, target, bins().float())
    assert bool(torch.isfinite(left_weight).all())
    torch.testing.assert_close(left_weight + right_weight, torch.ones(2, 4))
    assert int(left_bin.min()) >= 0
    assert int(left_bin.max()) <= 7


def test_encode_without_pairs() -> None:
    """M = 0 gives three (0, 4)."""
    none = torch.zeros(0, 4)
    assert [tuple(x.shape) for x in encode_boxes(none, none, bins().float())] == [(0, 4)] * 3


def test_targets_carry_no_gradient() -> None:
    """Boxes that want a gradient get targets that have none."""
    boxes, targets = random_boxes(0, 3).requires_grad_(), random_boxes(1, 3).requires_grad_()
    weights = bins().requires_grad_()
    assert not any(x.requires_grad for x in encode_boxes(boxes, targets, weights))


def test_encode_computes_halves_in_float32() -> None:
    """Half-precision boxes give what their float32 copies give, under autocast too."""
    boxes, targets, weights = random_boxes(0, 6).half(), random_boxes(1, 6).half(), bins().float()
    expected = encode_boxes(boxes.float(), targets.float(), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = encode_boxes(boxes, targets, weights)
    assert actual[1].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
